// What this browser can do, and what it tells of the phone.

// A module with one function that makes a v128 of zeros: valid only where SIMD is known.
const SIMD = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11];

export function hasSimd() {
  return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(SIMD));
}

/** Why the page cannot work here, a sentence for people; null if it can. */
export function missing() {
  if (typeof WebAssembly !== "object") return "This browser has no WebAssembly, so it cannot run a model.";
  if (!hasSimd()) {
    return "This browser has no WebAssembly SIMD, without which a model does not run. It is in Chrome 91, Firefox 89, Safari 16.4 and later.";
  }
  if (typeof BigInt64Array !== "function" || typeof Worker !== "function") {
    return "This browser is too old: it has no BigInt64Array or no workers.";
  }
  return null;
}

/** Most threads that can be asked for: more than one needs isolation, which needs https or localhost. */
export function mostThreads() {
  return self.crossOriginIsolated ? Math.max(1, Math.min(navigator.hardwareConcurrency || 1, 8)) : 1;
}

/** Steps of the clock in ms: 0.005 where isolated, 0.1 to 1 elsewhere. */
function clockResolution() {
  let smallest = Infinity;
  const until = performance.now() + 20;
  for (let last = performance.now(), now = last; now < until; now = performance.now()) {
    if (now > last) smallest = Math.min(smallest, now - last);
    last = now;
  }
  return Number.isFinite(smallest) ? smallest : 20;
}

/** The facts that go with every figure; null where the browser does not tell. */
export async function describe(threads, runtime) {
  let told = {};
  try {
    told = (await navigator.userAgentData?.getHighEntropyValues(["model", "platformVersion"])) ?? {};
  } catch {
    // refused: it is the browser's to tell or not
  }
  const cut = (text) => (text ? String(text).slice(0, 500) : null);
  return {
    user_agent: cut(navigator.userAgent) ?? "",
    model: cut(told.model),
    platform: cut([told.platform ?? navigator.platform, told.platformVersion].filter(Boolean).join(" ")),
    cores: navigator.hardwareConcurrency ?? null,
    device_memory_gb: navigator.deviceMemory ?? null,
    simd: hasSimd(),
    isolated: self.crossOriginIsolated === true,
    threads,
    clock_resolution_ms: clockResolution(),
    runtime,
  };
}

/** What open bundles may take together: a quarter of the memory that the browser admits to (at most 8 GB). */
export function memoryBudget() {
  return ((navigator.deviceMemory ?? 4) / 4) * 2 ** 30;
}

/** An error of the runtime or browser, as a sentence that helps. `expected` bytes. */
export function explained(message, expected) {
  if (/memory|alloc|RangeError|OOM|Aborted/i.test(message)) {
    const needed = Math.round(expected / 1e6);
    return `The browser did not give the memory (about ${needed} MB) that this bundle needs. Close other tabs and apps, or take a smaller bundle. (${message})`;
  }
  return message;
}
