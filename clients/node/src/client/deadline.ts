import { uptime } from "node:os";

/**
 * What is taken off every grant: Node has no boot clock, and the system's uptime, which counts suspended time and is never
 * stepped, is read in steps of 10 ms on Linux.
 */
export const CLOCK_GUARD_MS = 20;

/** Milliseconds since the machine started, suspended ones included. */
export function bootMs(): number {
  return uptime() * 1000;
}

/**
 * Until when a leadership is valid, by the app's own clock. Each message is stamped before it is sent, and what the server
 * grants counts from the stamp of the message it answers: a late answer grants less, never more. Sequences count the messages
 * of one stream: 0 is `start`, then come the heartbeats.
 */
export class Deadline {
  #at = -Infinity;
  #sequence = 0n;
  #stamps = new Map<bigint, number>();

  constructor(readonly now: () => number = bootMs) {}

  /** What is left, in milliseconds; 0 = it is over. */
  get remainingMs(): number {
    return Math.max(this.#at - this.now(), 0);
  }

  /** The first message of a stream is about to be sent. Answers of earlier streams can't be told any more. */
  start(): void {
    this.#sequence = 0n;
    this.#stamps = new Map([[0n, this.now()]]);
  }

  /** The sequence of the heartbeat that is about to be sent. */
  beat(): bigint {
    this.#sequence += 1n;
    this.#stamps.set(this.#sequence, this.now());
    return this.#sequence;
  }

  /** The server's answer to a message. It never moves the deadline back; one to no message that was sent grants nothing. */
  grant(sequence: bigint, ms: number): void {
    const stamp = this.#stamps.get(sequence);
    if (stamp === undefined) return;
    this.#at = Math.max(this.#at, stamp + ms - CLOCK_GUARD_MS);
    for (const known of this.#stamps.keys()) if (known < sequence) this.#stamps.delete(known);
  }

  /** Another term: what was granted for the last one does not count for it. */
  reset(): void {
    this.#at = -Infinity;
  }
}
