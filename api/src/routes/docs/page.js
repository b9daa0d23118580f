"use strict";
// Everything is put in as text, never as markup: the document is data.

const METHODS = ["get", "post", "put", "patch", "delete"];
let api = {};

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  children.flat().filter((child) => child !== null && child !== undefined).forEach((child) => element.append(child));
  return element;
}

function follow(schema) {
  const name = schema && schema.$ref && schema.$ref.split("/").pop();
  return name ? [name, ((api.components || {}).schemas || {})[name] || {}] : [null, schema || {}];
}

// A schema as the text of an example-like outline: names, types and what a field means.
function outline(schema, indent, seen) {
  const [name, shape] = follow(schema);
  if (name && seen.includes(name)) return name;
  const inside = name ? seen.concat(name) : seen;
  const pad = "  ".repeat(indent + 1);
  const choices = shape.oneOf || shape.anyOf;
  if (choices) return choices.map((choice) => outline(choice, indent, inside)).join("\n" + "  ".repeat(indent) + "| ");
  if (shape.allOf) return shape.allOf.map((part) => outline(part, indent, inside)).join(" & ");
  if (shape.enum) return shape.enum.map((value) => JSON.stringify(value)).join(" | ");
  const type = [].concat(shape.type || (shape.properties ? "object" : "any"));
  const orNull = type.includes("null") ? " | null" : "";
  if (type.includes("array")) return "[" + outline(shape.items, indent, inside) + "]" + orNull;
  if (shape.properties) {
    const required = shape.required || [];
    const lines = Object.entries(shape.properties).map(([field, value]) => {
      const note = (value.description || follow(value)[1].description || "").split("\n")[0];
      const mark = required.includes(field) ? "" : "?";
      return pad + field + mark + ": " + outline(value, indent + 1, inside) + (note ? "   // " + note : "");
    });
    return "{\n" + lines.join("\n") + "\n" + "  ".repeat(indent) + "}" + orNull;
  }
  if (type.includes("object") && shape.additionalProperties) return "{<name>: " + outline(shape.additionalProperties, indent, inside) + "}" + orNull;
  const base = type.filter((part) => part !== "null").join(" | ");
  return base + (shape.format ? " (" + shape.format + ")" : "") + orNull;
}

function body(content) {
  return Object.entries(content || {}).map(([kind, media]) =>
    make("div", {}, make("code", {}, kind), media.schema ? make("pre", {}, outline(media.schema, 0, [])) : null));
}

function who(operation) {
  const schemes = (operation.security || []).flatMap((entry) => Object.keys(entry));
  if (schemes.includes("device_token")) return "device";
  if (schemes.length === 0) return "anybody";
  return /Needs the Admin role\.$/.test(operation.description || "") ? "admin" : "operator";
}

function show(path, method, operation) {
  const parameters = (operation.parameters || []).map((parameter) => make("tr", {},
    make("td", {}, make("code", {}, parameter.name)),
    make("td", {}, parameter.in + (parameter.required ? ", required" : "")),
    make("td", {}, parameter.schema ? outline(parameter.schema, 0, []) : ""),
    make("td", {}, parameter.description || "")));
  const responses = Object.entries(operation.responses || {}).map(([status, response]) =>
    make("div", {}, make("strong", {}, status), " ", response.description || "", body(response.content)));
  const verb = method.toUpperCase();
  const entry = make("details", {},
    make("summary", {}, make("span", { class: "method " + verb }, verb), make("code", {}, path),
      make("span", {}, operation.summary || ""), make("span", { class: "who" }, who(operation))),
    make("div", {},
      operation.description ? make("p", { class: "text" }, operation.description) : null,
      parameters.length ? [make("h3", {}, "Parameters"), make("table", {}, parameters)] : null,
      operation.requestBody ? [make("h3", {}, "Body"), body(operation.requestBody.content)] : null,
      make("h3", {}, "Answers"), responses));
  entry.dataset.words = [verb, path, operation.summary, operation.description].join(" ").toLowerCase();
  return entry;
}

function find(event) {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  document.querySelectorAll("main details").forEach((entry) => {
    entry.hidden = !words.every((word) => entry.dataset.words.includes(word));
  });
  document.querySelectorAll("main section").forEach((section) => {
    section.hidden = !section.querySelector("details:not([hidden])");
  });
}

fetch("/api/openapi.json").then((answer) => answer.json()).then((found) => {
  api = found;
  document.getElementById("title").textContent = api.info.title + " " + api.info.version;
  document.getElementById("about").textContent = api.info.description || "";
  const areas = new Map();
  Object.entries(api.paths).forEach(([path, item]) => METHODS.filter((method) => item[method]).forEach((method) => {
    const area = (item[method].tags || ["Other"])[0];
    areas.set(area, (areas.get(area) || []).concat(show(path, method, item[method])));
  }));
  const sections = [...areas].map(([area, entries]) => make("section", {}, make("h2", {}, area), entries));
  document.getElementById("routes").append(...sections);
  document.getElementById("find").addEventListener("input", find);
}).catch((error) => {
  document.getElementById("about").textContent = "The document could not be loaded: " + error.message;
});
