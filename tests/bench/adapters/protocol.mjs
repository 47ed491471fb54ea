// The protocol of `protocol.py`, for Node.
import { writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

export const BULK = 100;
export const WINDOW = 64;
const PAD = "x".repeat(96);

/** Peers are installed elsewhere. */
export const load = createRequire(`${process.env.BENCH_NODE_MODULES}/`);
export const task = (number) => ({ id: number, pad: PAD });
export const say = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);
const now = () => process.hrtime.bigint();

/** Shares numbers first, first + step, ... out among so many loops, each awaiting its send. */
export async function share(first, count, step, loops, send) {
  let next = first;
  const run = async () => {
    while (next < first + count) {
      const number = next;
      next += step;
      await send(number, Math.min(step, first + count - number));
    }
  };
  await Promise.all(Array.from({ length: loops }, run));
}

export const numbers = (first, count) => Array.from({ length: count }, (_, at) => first + at);

export async function timed(work) {
  const start = now();
  await work();
  return { seconds: Number(now() - start) / 1e9 };
}

/** Sends task i at times[i], without waiting for the answers before. */
export async function whenDue(times, send) {
  const start = now();
  const sent = [];
  for (const [number, due] of times.entries()) {
    const wait = due * 1e3 - Number(now() - start) / 1e6;
    if (wait >= 1) await sleep(wait);
    while (Number(now() - start) / 1e9 < due) await new Promise(setImmediate);
    sent.push(send(number));
  }
  await Promise.all(sent);
  return { start_ns: Number(start) };
}

export async function produce(handlers) {
  say({ event: "ready" });
  for await (const line of createInterface({ input: process.stdin })) {
    const command = JSON.parse(line);
    try {
      say(await handlers[command.do](command));
    } catch (error) {
      say({ error: String(error) });
    }
  }
  process.exit(0);
}

/** Notes which tasks were handled and when. */
export function recorder(count, path) {
  const ids = [];
  const times = [];
  let cpu;
  process.stdin.once("data", () => {
    writeFileSync(path, ids.map((number, at) => `${number} ${times[at]}\n`).join(""));
    process.stdout.write(`${JSON.stringify({ event: "written" })}\n`, () => process.exit(0));
  });
  return (number) => {
    if (ids.length === 0) cpu = process.cpuUsage();
    ids.push(number);
    times.push(now());
    if (ids.length === count) {
      const { user, system } = process.cpuUsage(cpu);
      const [first, last] = [times[0], times.at(-1)].map(Number);
      say({ event: "done", first_ns: first, last_ns: last, cpu_seconds: (user + system) / 1e6 });
    }
  };
}
