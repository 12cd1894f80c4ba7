// Plays the policy in policy.json, or in a file that the user chooses.

"use strict";

const element = (id) => document.getElementById(id);
const environment = new CartPole();
let policy = null;
let [longest, episodes] = [0, 0];

function show(description) {
  try {
    policy = new Policy(description);
    if (description.observation[0].shape[0] !== 4) throw new Error("the policy is not one of CartPole");
  } catch (error) {
    policy = null;
    element("error").textContent = `This policy cannot be played: ${error.message}.`;
    return;
  }
  const { environment: id, steps, proximo } = description.about;
  element("facts").textContent = `A policy trained in ${id} for ${steps.toLocaleString("en")} steps by Proximo ${proximo}.`;
  element("error").textContent = "";
  [longest, episodes] = [0, 0];
  environment.reset();
}

function step() {
  if (!policy) return;
  const { terminated, truncated } = environment.step(policy.act(environment.state));
  longest = Math.max(longest, environment.steps);
  element("step").textContent = environment.steps;
  element("longest").textContent = longest;
  if (terminated || truncated) {
    episodes += 1;
    element("episodes").textContent = episodes;
    environment.reset();
  }
}

function draw() {
  const canvas = element("canvas");
  const context = canvas.getContext("2d");
  const [width, height] = [canvas.width, canvas.height];
  const scale = width / (2 * CARTPOLE.maxPosition);
  const [x, , angle] = environment.state;
  const [left, ground, pole] = [width / 2 + x * scale, 0.75 * height, 2 * CARTPOLE.length * scale];
  context.clearRect(0, 0, width, height);
  context.fillStyle = "#9aa5b1";
  context.fillRect(0, ground + 15, width, 2);
  context.fillStyle = "#1f2933";
  context.fillRect(left - 35, ground - 15, 70, 30);
  context.strokeStyle = "#c46b2b";
  context.lineWidth = 12;
  context.lineCap = "round";
  context.beginPath();
  context.moveTo(left, ground - 15);
  context.lineTo(left + pole * Math.sin(angle), ground - 15 - pole * Math.cos(angle));
  context.stroke();
  requestAnimationFrame(draw);
}

element("push").onclick = () => {
  environment.state[3] += 0.4 * (Math.random() < 0.5 ? -1 : 1);
};
element("file").onchange = async ({ target }) => {
  try {
    show(JSON.parse(await target.files[0].text()));
  } catch (error) {
    element("error").textContent = `The file cannot be read: ${error.message}.`;
  }
};
fetch("policy.json")
  .then((response) => (response.ok ? response.json() : Promise.reject(new Error("there is no such file"))))
  .then(show)
  .catch((error) => {
    element("facts").textContent = "Choose an exported policy below.";
    element("error").textContent = `policy.json was not loaded: ${error.message}.`;
  });
setInterval(step, 1000 * CARTPOLE.seconds);
requestAnimationFrame(draw);
