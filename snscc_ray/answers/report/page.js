"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const percent = (share) => (share === 1 || share < 0.995 ? Math.round(share * 100) + "%" : "99%+");

/* ---------------------------------------------------------------- images */

function picture(row) {
  const span = document.createElement("span");
  if (!(row in data.places)) return span; // an embedding without a picture
  const [sheet, column, line] = data.places[row];
  span.className = `pic s${sheet}`;
  span.style.setProperty("--x", column);
  span.style.setProperty("--y", line);
  return span;
}

function facts(row) {
  const image = data.images[row];
  const found = [`${data.names[image.cluster]}, ${percent(image.confidence)} confident`];
  if (image.second_confidence >= 0.005) {
    found.push(`else ${data.names[image.second]} (${percent(image.second_confidence)})`);
  }
  if (data.class_names) found.push(`label: ${data.class_names[image.label]}`);
  return found;
}

/* Ids are only ever set as text. */
function enlarge(row) {
  byId("large-pic").replaceChildren(picture(row));
  byId("large-id").textContent = data.images[row].id;
  byId("large-facts").replaceChildren(
    ...facts(row).map((text) => {
      const item = document.createElement("li");
      item.textContent = text;
      return item;
    }),
  );
  byId("large").showModal();
}

document.addEventListener("click", (event) => {
  const thumb = event.target.closest(".thumb");
  if (thumb) enlarge(thumb.dataset.row);
  if (event.target === byId("large")) byId("large").close(); // its backdrop
});
byId("large-close").addEventListener("click", () => byId("large").close());

byId("filter").addEventListener("change", (event) => {
  for (const part of document.querySelectorAll("[data-cluster]")) {
    part.hidden = event.target.value !== "" && part.dataset.cluster !== event.target.value;
  }
});

byId("border")?.addEventListener("change", (event) => {
  for (const part of document.querySelectorAll("[data-border]")) {
    part.hidden = part.dataset.border !== event.target.value;
  }
});
