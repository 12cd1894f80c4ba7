// A policy exported by `proximo export RUN --format json`, for observations that are one vector and networks that are
// multilayer perceptrons without memory. The Python file of `--format numpy` computes every other kind, and is the model
// for more.

"use strict";

const ACTIVATIONS = {
  tanh: Math.tanh,
  relu: (x) => Math.max(x, 0),
  elu: (x) => (x > 0 ? x : Math.expm1(x)),
  silu: (x) => x / (1 + Math.exp(-x)),
  leaky_relu: (x) => (x >= 0 ? x : 0.01 * x),
};

class Policy {
  constructor(description) {
    const { network, observation, action } = description;
    const unsupported = [
      [description.format !== "proximo-policy" || description.schema !== 1, "this is not a policy of schema 1"],
      [observation.length !== 1 || observation[0].kind !== "vector", "the observation is not one vector"],
      [action.length !== 1 || !["categorical", "gaussian"].includes(action[0].kind), "the action is not supported"],
      [network.memory !== "none", "the network has a memory"],
      [network.layer_norm || network.residual, "the network has normalised layers"],
      [!(network.activation in ACTIVATIONS), `the activation ${network.activation} is not supported`],
    ].filter(([is]) => is);
    if (unsupported.length) throw new Error(unsupported[0][1]);
    this.description = description;
    this.weights = Object.fromEntries(
      Object.entries(description.weights).map(([name, [shape, text]]) => [name, decode(text)]),
    );
  }

  // The action for an observation, an array of numbers: a number for discrete actions, an array for continuous ones.
  act(observation) {
    const outputs = this.outputs(observation);
    const action = this.description.action[0];
    if (action.kind === "gaussian") return continuous(action, outputs);
    let first = 0;
    const choices = action.entries.map(({ n, start }) => {
      const logits = outputs.slice(first, (first += n));
      return logits.indexOf(Math.max(...logits)) + start;
    });
    return action.shape.length ? choices : choices[0];
  }

  // The outputs of the network: one logit for each discrete action, or the means of continuous ones.
  outputs(observation) {
    const { network, observation: [leaf], clip_observation: clip } = this.description;
    let x = Array.from(observation);
    if (leaf.normalize) {
      const [mean, scale] = [this.weights[`${leaf.name}.mean`], this.weights[`${leaf.name}.scale`]];
      x = x.map((value, i) => Math.min(Math.max((value - mean[i]) * scale[i], -clip), clip));
    }
    const part = network.parts[0];
    for (let layer = 0; layer < part.layers; layer++) {
      x = this.linear(`${part.name}.${layer}`, x).map(ACTIVATIONS[network.activation]);
    }
    return this.linear("actor.head", x);
  }

  // x W + b, where the weight has a row for each input.
  linear(name, x) {
    const [weight, bias] = [this.weights[`${name}.weight`], this.weights[`${name}.bias`]];
    return Array.from(bias, (sum, j) => x.reduce((total, value, i) => total + value * weight[i * bias.length + j], sum));
  }
}

// The mean, squashed, rescaled and clipped as configured.
function continuous(action, outputs) {
  return action.low.map((bound, i) => {
    const [low, high] = [bound ?? -Infinity, action.high[i] ?? Infinity];
    let x = action.tanh_mean ? Math.tanh(outputs[i]) : outputs[i];
    if (action.squash) x = Math.tanh(x);
    if (action.rescale) x = low + 0.5 * (x + 1) * (high - low);
    return action.clip ? Math.min(Math.max(x, low), high) : x;
  });
}

// Little-endian float32 numbers in base64.
function decode(text) {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}
