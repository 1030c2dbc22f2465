// Scoring: items of token ids, one after another, each bundle in a worker of its own, after the benchmark.
//
// An item is a list of requests, [context, continuation]; its answer has for each the sum of the continuation's
// log-probabilities, and whether each of its tokens was the most likely one. What is answered is sent every few
// seconds, so that a phone that gives up in the middle leaves what it had.

const SENT_EVERY_MS = 5000;

/** How many items there are to score. */
export const itemsOf = (plan) => plan.bundles.reduce((sum, bundle) => sum + (bundle.requests?.items ?? 0), 0);

/**
 * Score the plan's items. `made(label)` gives a fresh Bundle, `told(label, answers)` takes what is answered so far,
 * `step(done, total, note)` sends it and is awaited now and then, `cancelled()` is asked between items. Resolves to
 * whether all is done.
 */
export async function scoreAll(plan, { made, step, told, cancelled }) {
  const total = itemsOf(plan);
  let done = 0;
  for (const { label, requests } of plan.bundles.filter((bundle) => bundle.requests)) {
    await step(done, total, `${label}: load, to score ${requests.items} items`);
    const answer = await fetch(requests.url, { cache: "no-store" });
    if (!answer.ok) throw new Error(`The items of ${label} could not be fetched (${answer.status}).`);
    const items = await answer.json();
    const bundle = made(label);
    const answers = [];
    let sent = performance.now();
    try {
      await bundle.opened;
      for (const item of items) {
        if (cancelled()) return false;
        answers.push(await bundle.ask("score", { requests: item }));
        done += 1;
        if (answers.length < items.length && performance.now() - sent < SENT_EVERY_MS) continue;
        told(label, [...answers]);
        await step(done, total, `${label}: ${answers.length} of ${items.length} items scored`);
        sent = performance.now();
      }
    } finally {
      bundle.close();
    }
  }
  return true;
}

/** [log-probability of a token, whether it is the likeliest] from its logits. */
export function likelihood(logits, token) {
  let peak = -Infinity;
  let best = 0;
  for (let i = 0; i < logits.length; i++) {
    if (logits[i] > peak) {
      peak = logits[i];
      best = i;
    }
  }
  let total = 0;
  for (let i = 0; i < logits.length; i++) total += Math.exp(logits[i] - peak);
  const value = logits[token] - peak - Math.log(total);
  if (!Number.isFinite(value)) throw new Error("The model gave logits that are not finite; its weights are broken.");
  return [value, best === token];
}
