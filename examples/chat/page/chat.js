"use strict";

// The events of the room come from the web server, in order. Each has its kind in `event`: see examples/chat/board.py.

const at = (id) => document.getElementById(id);
const base = location.pathname.replace(/\/$/, "");
const room = decodeURIComponent(base.split("/").pop());
const lines = new Map();
let name = sessionStorage.getItem("name") || "";
let source = null;
let connected = true;
let server = true;
let refusal = ""; // why the last thing that this person did had no effect

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// -- lines ---------------------------------------------------------------------------------------------------------

const REMARKS = {
  waiting: "waits until the team has answered",
  unheard: "not answered",
  writing: "is writing",
  broken: "did not get to the end",
};

const VERDICTS = {
  approved: (line) => `✓ ${line.by} approved`,
  refused: (line) => `✗ ${line.by} refused`,
  withdrawn: () => "The question was withdrawn.",
};

const HUES = { writer: 222, editor: 280, publisher: 168 };

function hue(text) {
  if (Object.hasOwn(HUES, text)) return HUES[text];
  let sum = 0;
  for (const letter of text) sum = (sum * 31 + letter.codePointAt(0)) % 360;
  return sum;
}

function box(line) {
  const item = element("li", `line ${line.kind} ${line.state}`);
  item.dataset.id = line.id;
  if (line.kind === "error") {
    item.textContent = line.text;
    return item;
  }
  if (line.kind === "person" && line.name === name) item.classList.add("mine");
  item.setAttribute("aria-busy", String(line.state === "writing"));
  const face = element("span", "face", [...line.name][0].toUpperCase());
  face.setAttribute("aria-hidden", "true");
  face.style.setProperty("--hue", hue(line.name));
  const body = element("div", "body");
  const who = element("p", "who");
  who.append(element("strong", "", line.name));
  if (REMARKS[line.state]) who.append(` ${REMARKS[line.state]}`);
  body.append(who, line.kind === "question" ? question(line) : element("p", "text", line.text));
  item.append(face, body);
  return item;
}

function question(line) {
  const card = element("div", "text");
  card.append("May this be published?", element("q", "quoted", line.text));
  if (line.state !== "open") {
    card.append(element("strong", "verdict", VERDICTS[line.state](line)));
  } else if (name) {
    const choices = element("div", "choices");
    for (const [label, approved] of [["Approve", true], ["Refuse", false]]) {
      const button = element("button", approved ? "primary" : "", label);
      button.type = "button";
      button.addEventListener("click", async () => {
        for (const one of choices.children) one.disabled = true;
        if (!(await send(`questions/${line.id}`, { approved }))) {
          for (const one of choices.children) one.disabled = false;
        }
      });
      choices.append(button);
    }
    card.append(choices);
  } else {
    card.append(element("strong", "verdict", "Join to answer."));
  }
  return card;
}

function show(line) {
  const old = lines.get(line.id);
  const made = box(line);
  lines.set(line.id, { line, box: made });
  if (old) old.box.replaceWith(made);
  else at("lines").append(made);
}

function showAll(all) {
  lines.clear();
  at("lines").replaceChildren();
  for (const line of all) show(line);
}

// -- events --------------------------------------------------------------------------------------------------------

const HEARD = {
  all: (event) => showAll(event.lines),
  line: (event) => show(event.line),
  text: (event) => {
    const found = lines.get(event.id);
    if (!found) return;
    found.line.text += event.text;
    found.box.querySelector(".text").textContent = found.line.text;
  },
  people: (event) => {
    at("people").textContent = event.people.length ? `Here: ${event.people.join(", ")}` : "";
  },
  status: (event) => {
    server = event.server;
    at("agents").replaceChildren(...Object.entries(event.agents).map(([agent, there]) => {
      const item = element("li", there ? "" : "away", agent);
      item.title = there ? `a worker process hosts the ${agent}` : `no worker process hosts the ${agent} now`;
      if (!there) item.append(" (away)");
      return item;
    }));
  },
};

function hear(message) {
  const main = document.querySelector("main");
  const atEnd = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
  const event = JSON.parse(message.data);
  HEARD[event.event](event);
  at("empty").hidden = lines.size > 0;
  if (atEnd) main.scrollTop = main.scrollHeight;
  showTrouble();
}

function showTrouble() {
  let text = refusal;
  if (!connected) text = "The connection to the web server is lost. The page connects again by itself.";
  else if (!server) text = "The NATS server does not answer. The conversation goes on when it does.";
  if (at("trouble").textContent !== text) at("trouble").textContent = text;
  at("trouble").hidden = !text;
}

function connect() {
  if (source) source.close();
  source = new EventSource(`${base}/events?name=${encodeURIComponent(name)}`);
  source.onmessage = hear;
  source.onopen = () => {
    connected = true;
    showTrouble();
  };
  source.onerror = () => {
    connected = false;
    showTrouble();
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 1000);
  };
}

// -- what a person does --------------------------------------------------------------------------------------------

async function send(path, what) {
  refusal = await problem(path, { name, ...what });
  showTrouble();
  return !refusal;
}

// Sends a request. Returns why it had no effect; empty if it had.
async function problem(path, body) {
  try {
    const response = await fetch(`${base}/${path}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (response.ok) return "";
    const { detail } = await response.json();
    return typeof detail === "string" ? detail : "The web server does not accept that.";
  } catch {
    return "This was not sent: the web server does not answer. Please try again.";
  }
}

function join(as) {
  name = as;
  at("join").hidden = Boolean(name);
  at("say").hidden = !name;
  at("as").textContent = name;
  if (name) at("text").focus();
  else at("name").focus();
  connect();
}

at("join").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = at("name").value.trim();
  if (!given) return;
  sessionStorage.setItem("name", given);
  join(given);
});

at("say").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text) return;
  at("text").value = "";
  if (!(await send("messages", { text }))) at("text").value = at("text").value || text;
});

at("room").textContent = room;
document.title = `${room} · newsroom`;
join(name);
