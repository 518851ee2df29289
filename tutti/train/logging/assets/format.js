// Numbers and durations as people read them.
"use strict";

// 950, 12.3k, 4.56M, 7.1B
function short(value, digits = 3) {
  const size = Math.abs(value);
  const [scale, unit] =
    size >= 999.5e6 ? [1e9, "B"] : size >= 999.5e3 ? [1e6, "M"] : size >= 1000 ? [1e3, "k"] : [1, ""];
  return `${Number((value / scale).toPrecision(digits))}${unit}`;
}
const whole = (value) => Math.round(value).toLocaleString("en");
const fixed = (value, digits = 4) =>
  value === null || value === undefined
    ? "–"
    : Math.abs(value) < 0.001 || Math.abs(value) >= 1e5
      ? value.toPrecision(4)
      : value.toFixed(digits);
const percent = (value, digits = 1) => `${(value * 100).toFixed(digits)} %`;
const power = (value) =>
  value === 0
    ? "0"
    : Math.abs(value) >= 0.01 && Math.abs(value) < 1e4
      ? String(Number(value.toPrecision(4)))
      : value
          .toExponential(Number((value / 10 ** Math.floor(Math.log10(Math.abs(value)))).toPrecision(3)) % 1 ? 1 : 0)
          .replace("e-", "e−");
const plain = (value) => String(Number(value.toPrecision(3)));
const exact = (value) => String(Number(value.toPrecision(8)));

function duration(seconds) {
  const s = Math.round(seconds);
  if (s < 60) return seconds < 10 ? `${seconds.toFixed(1)} s` : `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}
