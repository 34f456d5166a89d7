// The console: plain JavaScript, no dependencies, no requests to anywhere but this endpoint.
"use strict";

const MOST = 3;
const element = (id) => document.getElementById(id);
let running = [];
let seen = null;
let rates = [];
const shown = {};

function headers(more = {}) {
  const key = sessionStorage.getItem("rankloom-key");
  return key ? { authorization: `Bearer ${key}`, ...more } : more;
}

function make(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

let noticeStays = 0;

/** Show a notice, which stays until `stays` looks have succeeded. */
function notify(text, failed = true, stays = 10) {
  const notice = element("notice");
  if (notice.textContent !== text) notice.textContent = text; // else it would be read aloud at every look
  notice.classList.toggle("failed", failed);
  notice.hidden = !text;
  noticeStays = stays;
}

// ---- what is served

async function look() {
  try {
    const answer = await fetch("console/state", { headers: headers() });
    const state = await answer.json();
    element("key-form").hidden = answer.status !== 401;
    if (!answer.ok) {
      const isFirst = answer.status === 401 && !sessionStorage.getItem("rankloom-key"); // the form says enough
      notify(isFirst ? "" : state.error.message, true, 0);
      return;
    }
    if (--noticeStays < 0) notify("");
    measure(state);
    show(state);
  } catch (error) {
    notify(`The endpoint can't be reached: ${error.message}`, true, 0);
  }
}

function measure(state) {
  const hasTotals = state.requests !== undefined; // for an admin, or where there are no keys
  for (const id of ["figures", "trace"]) element(id).toggleAttribute("hidden", !hasTotals);
  if (!hasTotals) return;
  const now = performance.now();
  if (seen) {
    const rate = Math.max(0, ((state.completion_tokens - seen.tokens) * 1000) / (now - seen.at));
    rates = [...rates.slice(-59), rate];
    const top = Math.max(1, ...rates);
    const points = rates.map((each, i) => `${((60 - rates.length + i) * 120) / 59},${31 - (29 * each) / top}`);
    element("trace").querySelector("polyline").setAttribute("points", points.join(" "));
    element("rate").textContent = rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString();
  }
  seen = { tokens: state.completion_tokens, at: now };
  element("running").textContent = state.in_flight;
  element("answered").textContent = state.requests.toLocaleString();
}

/** Show a part of the state where it has changed; focus stays on the control of the same key. */
function showPart(name, value, render) {
  const written = JSON.stringify(value ?? null);
  if (shown[name] === written) return;
  shown[name] = written;
  const key = document.activeElement?.dataset?.key;
  render(value);
  if (key && document.activeElement === document.body) document.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

function show(state) {
  showPart("models", [state.models, state.admin], () => showModels(state));
  showPart("routes", [state.routes, state.admin], () => {
    element("routes-section").hidden = !state.routes.length;
    element("routes").replaceChildren(...state.routes.map((route) => routeCard(route, state.admin)));
  });
  showPart("recent", state.recent, (recent) => {
    element("recent-section").hidden = !recent?.length;
    element("recent").replaceChildren(...(recent ?? []).map(requestRow));
  });
}

function showModels(state) {
  element("base").textContent = `${state.models.length} models on ${state.base}, context ${state.context}`;
  const chosen = new Set(ticked());
  element("models").replaceChildren(...state.models.map((model, i) => {
    const label = make("label");
    const box = make("input");
    box.type = "checkbox";
    box.name = "model";
    box.value = model.id;
    box.dataset.key = `model ${model.id}`;
    box.checked = chosen.size ? chosen.has(model.id) : i < 2;
    label.append(box, ` ${model.id}`);
    return label;
  }));
  limit();
  element("cards").replaceChildren(...state.models.filter((model) => model.ref).map((model) => {
    const article = card(model);
    if (state.admin && model.id === model.adapter) article.append(aliasMoves(model));
    return article;
  }));
}

// ---- routes, aliases and requests

function routeCard(route, admin) {
  const article = make("article");
  const words = [route.canary && "canary", route.sticky && "sticky"].filter(Boolean).join(", ");
  article.append(make("h3", route.name), make("p", words || "route"));
  for (const arm of route.arms) {
    const row = make("div", undefined, "arm");
    const means = arm.ref === null ? "missing" : arm.ref === arm.to ? "" : ` is ${arm.ref}`;
    const meter = make("meter");
    meter.value = arm.share;
    meter.setAttribute("aria-label", `share of ${arm.to}`);
    row.append(make("span", `${arm.to}${means}`, arm.ref === null ? "failed" : ""), make("span", percent(arm.share)), meter);
    if (arm.requests !== undefined) row.append(make("small", `${arm.requests} request${arm.requests === 1 ? "" : "s"}, ${arm.errors} failed`));
    article.append(row);
  }
  const facts = [...route.rules, ...route.fallback.map((to) => `falls back to ${to}`)];
  if (route.shadow) facts.push(`${percent(route.shadow.share)} copied to ${route.shadow.to}`);
  for (const fact of facts) article.append(make("p", fact));
  if (admin && route.canary && route.arms.length === 2) article.append(canaryMoves(route));
  return article;
}

function canaryMoves(route) {
  const { adapter, stable, candidate } = route.canary;
  const [now, tried] = route.arms.map((arm) => ({ ref: arm.ref, version: Number(arm.ref?.split("@")[1]) }));
  const moves = make("div", undefined, "moves");
  moves.append(
    moveButton(`promote ${route.name}`, `Promote ${tried.ref}`, "console/promote",
      { adapter, version: tried.version, alias: stable },
      `Send all requests of ${route.name} to ${tried.ref}?`, `${adapter}@${stable} is ${now.ref ?? "missing"} now.`),
  );
  if (now.ref) {
    moves.append(
      moveButton(`end ${route.name}`, "Roll back", "console/promote", { adapter, version: now.version, alias: candidate },
        `End the canary of ${route.name}?`, `${tried.ref} gets no more requests; ${now.ref} gets all.`),
    );
  }
  return moves;
}

function aliasMoves(model) {
  const moves = make("div", undefined, "moves");
  const champion = model.aliases.champion;
  const aliases = Object.entries(model.aliases).map(([alias, version]) => `${alias} is version ${version}`);
  moves.append(make("small", aliases.join(", ") || "no alias"));
  const others = model.versions.filter((version) => version !== champion).reverse();
  if (others.length) {
    const select = make("select");
    select.dataset.key = `version ${model.adapter}`;
    select.setAttribute("aria-label", `version of ${model.adapter}`);
    select.append(...others.map((version) => make("option", String(version))));
    moves.append(select, moveButton(`promote ${model.adapter}`, "Promote", "console/promote",
      () => ({ adapter: model.adapter, version: Number(select.value), alias: "champion" }),
      () => `Make version ${select.value} the champion of ${model.adapter}?`,
      `${model.adapter}@champion is ${champion === undefined ? "not set" : `version ${champion}`} now.`));
  }
  if (champion !== undefined) {
    moves.append(moveButton(`roll back ${model.adapter}`, "Roll back", "console/rollback",
      { adapter: model.adapter, alias: "champion" },
      `Return ${model.adapter}@champion to the version before ${champion}?`, "The last promotion is undone."));
  }
  return moves;
}

/** A button that moves an alias once it is confirmed; `body` and `question` may be functions, called then. */
function moveButton(key, text, path, body, question, note) {
  const button = make("button", text);
  const now = (value) => (typeof value === "function" ? value() : value);
  button.type = "button";
  button.dataset.key = key;
  button.addEventListener("click", async () => {
    if (!(await confirmed(now(question), note, text))) return;
    try {
      const answer = await fetch(path, {
        method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(now(body)),
      });
      const moved = await answer.json();
      if (!answer.ok) {
        notify(`Nothing was changed: ${moved.error.message}`);
        return;
      }
      await look();
      notify(`${moved.alias} is ${moved.adapter} now.`, false);
    } catch (error) {
      notify(`The alias may have moved, as no answer came: ${error.message}`);
    }
  });
  return button;
}

function confirmed(question, note, text) {
  const dialog = element("confirm");
  element("confirm-text").textContent = question;
  element("confirm-note").textContent = note;
  element("confirm-yes").textContent = text;
  dialog.returnValue = "no"; // what Esc leaves
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", function settle() {
      if (dialog.open) return; // an earlier opening's event, which comes late
      dialog.removeEventListener("close", settle);
      resolve(dialog.returnValue === "yes");
    });
  });
}

function requestRow(request) {
  const row = make("tr", undefined, request.outcome === "ok" ? "" : "failed");
  const by = request.adapter + (request.arm ? ` (${request.arm})` : "");
  const first = request.first_s === null ? "" : Math.round(1000 * request.first_s);
  row.append(...[
    new Date(1000 * request.at).toLocaleTimeString(), request.model, by, request.prompt_tokens,
    request.completion_tokens, first, request.total_s.toFixed(2), request.outcome,
  ].map((text) => make("td", String(text))));
  return row;
}

function percent(share) {
  return `${Number((100 * share).toFixed(1))} %`;
}

function card(model) {
  const article = make("article");
  article.append(make("h3", model.id), make("p", `${model.ref}, ${model.method}, ${model.created}`));
  if (!model.rows.length) {
    article.append(make("p", "without a scorecard"));
    return article;
  }
  const table = make("table");
  const head = make("tr");
  head.append(...["", "adapter", "base"].map((text) => {
    const cell = make("th", text);
    cell.scope = "col";
    return cell;
  }));
  table.append(head);
  for (const [measure, ...values] of model.rows) {
    const row = make("tr");
    const name = make("th", measure);
    name.scope = "row";
    row.append(name, ...values.map((value) => make("td", value)));
    table.append(row);
  }
  article.append(table);
  return article;
}

function ticked() {
  return [...document.querySelectorAll("input[name=model]:checked")].map((box) => box.value);
}

function limit() {
  const full = ticked().length >= MOST;
  for (const box of document.querySelectorAll("input[name=model]")) box.disabled = full && !box.checked;
  element("send").disabled = running.length > 0 || ticked().length === 0;
}

// ---- asking

async function ask(model) {
  const article = make("article");
  const facts = make("p", "waiting");
  const text = make("pre");
  text.setAttribute("aria-live", "off");
  const thoughts = make("details");
  const thought = make("pre");
  thoughts.append(make("summary", "Thinking"), thought);
  const calls = [];
  article.append(make("h3", model), facts, text);
  element("answers").append(article);
  const stop = new AbortController();
  running.push(stop);
  const began = performance.now();
  let first = null;
  let finish = null;
  try {
    const system = element("system").value.trim();
    const messages = [{ role: "user", content: element("prompt").value }];
    if (system) messages.unshift({ role: "system", content: system });
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      signal: stop.signal,
      body: JSON.stringify({
        model, messages, ...tools(), stream: true, stream_options: { include_usage: true },
        max_tokens: Number(element("max-tokens").value), temperature: Number(element("temperature").value),
      }),
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const version = answer.headers.get("x-rankloom-version");
    const by = answer.headers.get("x-rankloom-adapter") + (version ? `@${version}` : "");
    for await (const chunk of events(answer.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const now = performance.now();
      if (chunk.choices.length) {
        first ??= now;
        const { delta, finish_reason } = chunk.choices[0];
        text.textContent += delta.content ?? "";
        if (delta.reasoning_content) {
          if (!thought.textContent) text.before(thoughts);
          thought.textContent += delta.reasoning_content;
        }
        for (const call of delta.tool_calls ?? []) {
          calls[call.index] ??= addCall(article);
          calls[call.index](call.function);
        }
        finish = finish_reason ?? finish;
      }
      if (chunk.usage) {
        const { completion_tokens: tokens, prompt_tokens: prompt, prompt_tokens_details: details } = chunk.usage;
        const pace = tokens > 1 ? `, ${((1000 * (tokens - 1)) / Math.max(1, now - first)).toFixed(1)} tokens/s` : "";
        const total = ((now - began) / 1000).toFixed(2);
        const cached = details?.cached_tokens ? `, ${details.cached_tokens} of them cached` : "";
        facts.textContent = `${by}: ${tokens} tokens, first after ${Math.round(first - began)} ms${pace}, ` +
          `${total} s in all; ${prompt} in the prompt${cached}; ended by ${finish}`;
      } else {
        facts.textContent = by;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      facts.textContent = "stopped";
    } else {
      article.className = "failed";
      facts.textContent = "failed";
      text.textContent += error.message;
    }
  } finally {
    running = running.filter((each) => each !== stop);
    text.setAttribute("aria-live", "polite");
    element("stop").disabled = running.length === 0;
    limit();
  }
}

/** Return a request's tools, from their text. Throws where that is no JSON. */
function tools() {
  const text = element("tools").value.trim();
  if (!text) return {};
  try {
    return { tools: JSON.parse(text), tool_choice: element("tool-choice").value };
  } catch (error) {
    throw new Error(`The tools are not JSON: ${error.message}`);
  }
}

/** Add a call of a tool to an answer, and return what takes its parts. */
function addCall(article) {
  const call = make("div", undefined, "call");
  const name = make("code");
  const args = make("pre");
  let written = "";
  call.append(name, args);
  article.append(call);
  return (part) => {
    name.textContent += part.name ?? "";
    written += part.arguments ?? "";
    try {
      args.textContent = JSON.stringify(JSON.parse(written), null, 1);
    } catch {
      args.textContent = written; // as far as it has come
    }
  };
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.length) return;
  element("answers").replaceChildren();
  for (const model of ticked()) ask(model);
  element("stop").disabled = running.length === 0;
  limit();
});
element("ask").addEventListener("change", limit);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("ask").requestSubmit();
});
element("stop").addEventListener("click", () => running.forEach((each) => each.abort()));
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("rankloom-key", element("key").value.trim());
  element("key").value = "";
  look();
});

async function keepLooking() {
  await look();
  setTimeout(keepLooking, 1000); // after the answer: a slow endpoint gets no second request meanwhile
}
keepLooking();
