import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { bootMs, CLOCK_GUARD_MS, Deadline } from "../src/client/deadline.js";

/** A deadline and the time that it reads, in milliseconds. */
function fake() {
  const clock = { now: 100_000 };
  return { clock, deadline: new Deadline(() => clock.now) };
}

test("a grant counts from before its message was sent, less the guard", () => {
  const { clock, deadline } = fake();
  deadline.start();
  clock.now += 700; // the answer is late
  deadline.grant(0n, 1800);
  assert.equal(deadline.remainingMs, 1100 - CLOCK_GUARD_MS);
  const first = deadline.beat();
  clock.now += 300;
  deadline.grant(first, 1800);
  assert.equal(deadline.remainingMs, 1500 - CLOCK_GUARD_MS);
  clock.now += 1500 - CLOCK_GUARD_MS;
  assert.equal(deadline.remainingMs, 0);
});

test("a deadline only moves forward", () => {
  const { clock, deadline } = fake();
  deadline.start();
  clock.now += 1000;
  const first = deadline.beat();
  deadline.grant(first, 2000);
  deadline.grant(0n, 2000); // an answer to what was sent before
  deadline.grant(first, 500); // a shorter one
  assert.equal(deadline.remainingMs, 2000 - CLOCK_GUARD_MS);
});

test("what nobody sent, or an earlier stream sent, grants nothing", () => {
  const { clock, deadline } = fake();
  deadline.start();
  const first = deadline.beat();
  deadline.grant(first + 1n, 3_600_000);
  assert.equal(deadline.remainingMs, 0);
  deadline.start();
  deadline.grant(first, 3_600_000);
  assert.equal(deadline.remainingMs, 0);
  clock.now += 1000;
  deadline.grant(0n, 3000);
  assert.equal(deadline.remainingMs, 2000 - CLOCK_GUARD_MS);
});

test("another term begins without the last one's time", () => {
  const { deadline } = fake();
  deadline.start();
  deadline.grant(0n, 3_600_000);
  deadline.reset();
  assert.equal(deadline.remainingMs, 0);
});

test("the clock goes on in steps that are smaller than the guard", async () => {
  const before = bootMs();
  assert.ok(before > 0);
  await sleep(2 * CLOCK_GUARD_MS);
  assert.ok(bootMs() - before >= CLOCK_GUARD_MS);
});
