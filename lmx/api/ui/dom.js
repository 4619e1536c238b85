// Elements, made and changed without markup: whatever the server says is text. No function here takes HTML.

/** `el("button", {class: "plain", onclick: f}, "Load")`; null children are left out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Changes nothing where nothing changed, so that selections stay and screen readers stay quiet. */
export function say(element, text) {
  const wanted = String(text ?? "");
  if (element.textContent !== wanted) element.textContent = wanted;
  return element;
}

/** `say`, and hidden without words. */
export function sayOrHide(element, text) {
  element.hidden = !text;
  return say(element, text);
}

export function attribute(element, name, value) {
  if (value == null || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/**
 * Makes `parent`'s children those of `items`, in their order. Whoever stays is the same element, so that focus stays too;
 * where the one with the focus goes, the nearest element that can take it has it.
 */
export function keyed(parent, items, keyOf, make, update) {
  const old = new Map([...parent.children].map((child) => [child.key, child]));
  const wanted = new Map(items.map((item) => [keyOf(item), item]));
  for (const [key, child] of old) {
    if (wanted.has(key)) continue;
    if (child.contains(document.activeElement)) parent.closest("[tabindex]")?.focus({ preventScroll: true });
    child.remove();
  }
  let place = parent.firstElementChild;
  for (const [key, item] of wanted) {
    let child = old.get(key);
    if (!child) {
      child = make(item);
      child.key = key;
    }
    update(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
}

/** A button that shows that it is at work; it keeps the focus meanwhile, which a disabled one would lose. */
export function busy(button, working, label, workingLabel) {
  attribute(button, "aria-disabled", working ? "true" : null);
  say(button, working ? workingLabel : label);
}
