// The physics of Gymnasium's CartPole-v1 (gymnasium/envs/classic_control/cartpole.py), with the same constants.

"use strict";

const CARTPOLE = { maxPosition: 2.4, maxAngle: (12 * 2 * Math.PI) / 360, maxSteps: 500, length: 0.5, seconds: 0.02 };

class CartPole {
  constructor() {
    this.reset();
  }

  // Begin an episode; returns the observation [position, velocity, angle, angular velocity].
  reset() {
    this.state = Array.from({ length: 4 }, () => 0.1 * Math.random() - 0.05);
    this.steps = 0;
    return this.state;
  }

  // Push the cart to the left (0) or right (1) for a step of 0.02 seconds.
  step(action) {
    const [gravity, massPole, massTotal, force] = [9.8, 0.1, 1.1, action === 1 ? 10 : -10];
    const { length, seconds, maxPosition, maxAngle } = CARTPOLE;
    const [x, velocity, angle, angular] = this.state;
    const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
    const push = (force + massPole * length * angular ** 2 * sin) / massTotal;
    const turn = (gravity * sin - cos * push) / (length * (4 / 3 - (massPole * cos ** 2) / massTotal));
    const acceleration = push - (massPole * length * turn * cos) / massTotal;
    this.state = [
      x + seconds * velocity,
      velocity + seconds * acceleration,
      angle + seconds * angular,
      angular + seconds * turn,
    ];
    this.steps += 1;
    const terminated = Math.abs(this.state[0]) > maxPosition || Math.abs(this.state[2]) > maxAngle;
    return { observation: this.state, terminated, truncated: this.steps >= CARTPOLE.maxSteps };
  }
}
