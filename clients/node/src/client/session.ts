import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs, durationMs } from "@bufbuild/protobuf/wkt";
import { Code, type Client } from "@connectrpc/connect";
import { RetinueError } from "./errors.js";
import { byCall, onStream, type Outcome } from "./outcome.js";
import { Outgoing } from "./outgoing.js";
import type { Lease } from "../retinue/workqueue/v1/task_pb.js";
import {
  StreamTasksRequestSchema,
  type ExtendResult,
  type StreamSettled,
  type StreamTasksRequest,
  type WorkQueueService,
} from "../retinue/workqueue/v1/workqueue_service_pb.js";

/** The reason of a handler's signal when the task is no longer this worker's: publish nothing. */
export class LeaseLost extends Error {
  override readonly name = "LeaseLost";
}

/** The reason of a handler's signal when the task was cancelled. */
export class TaskCancelled extends Error {
  override readonly name = "TaskCancelled";
}

export const LAST_WORDS_MS = 5_000; // for outcomes that come at the end of the grace
const LONGEST_RENEWAL_MS = 10_000; // an answer is asked for that often, so that a dead server shows
const CALL_TIMEOUT_MS = 10_000;
const LONGEST_TIMER_MS = 2 ** 31 - 1;

/** What a session needs of its worker. */
export interface Host {
  readonly client: Client<typeof WorkQueueService>;
  readonly queueId: string;
  readonly workerId: string;
  readonly leaseDurationMs: number | undefined;
  readonly life: AbortSignal;
  readonly soft: AbortSignal;
  readonly log: (message: string, error?: unknown) => void;
  /** Takes leases on; false if they must go back. */
  take(session: Session, leases: Lease[]): boolean;
}

/** A lease in this worker's hands. */
export class Held {
  /** Ends when the lease does. */
  readonly alive = new AbortController();
  /** Ends with `alive`, when the task is cancelled, at the attempt's deadline, or with the grace. */
  readonly handler = new AbortController();
  readonly durationMs: number;
  readonly #attempt: NodeJS.Timeout | undefined;
  readonly #unlink: () => void;
  #expiry: NodeJS.Timeout;

  constructor(
    readonly lease: Lease,
    host: Host,
  ) {
    const soften = () => this.handler.abort(host.soft.reason);
    const end = () => this.lose(host.life.reason);
    host.soft.addEventListener("abort", soften);
    host.life.addEventListener("abort", end);
    this.#unlink = () => {
      host.soft.removeEventListener("abort", soften);
      host.life.removeEventListener("abort", end);
    };
    this.durationMs = lease.leaseDuration ? durationMs(lease.leaseDuration) : 0;
    this.#expiry = this.#expireIn(this.durationMs);
    const limit = lease.attemptDuration ? durationMs(lease.attemptDuration) : Infinity;
    const late = () => this.handler.abort(new Error("cannot go on: the attempt took longer than it may"));
    if (limit <= LONGEST_TIMER_MS) this.#attempt = setTimeout(late, limit);
  }

  #expireIn(ms: number): NodeJS.Timeout {
    return setTimeout(() => this.lose(new LeaseLost("cannot go on: the lease was lost")), ms);
  }

  lose(reason: unknown): void {
    this.alive.abort(reason);
    this.handler.abort(reason);
  }

  cancel(): void {
    this.handler.abort(new TaskCancelled("cannot go on: the task was cancelled"));
  }

  /** The lease lasts until `deadline`, by performance.now(). */
  prolong(deadline: number): void {
    clearTimeout(this.#expiry);
    this.#expiry = this.#expireIn(deadline - performance.now());
  }

  drop(): void {
    clearTimeout(this.#expiry);
    clearTimeout(this.#attempt);
    this.#unlink();
  }
}

/** One stream with the leases that came on it. Those outlive it: they are then renewed and settled by calls. */
export class Session {
  /** Why it ended; undefined if the server closed it. */
  failure: RetinueError | undefined;
  readonly dead: Promise<void>;
  readonly draining: Promise<void>;
  readonly #host: Host;
  readonly #outgoing = new Outgoing<StreamTasksRequest>();
  readonly #breaker = new AbortController();
  readonly #held = new Map<Held, Promise<void>>();
  readonly #waiting = new Map<bigint, (settled: StreamSettled | undefined) => void>();
  #intervalMs = LONGEST_RENEWAL_MS; // between renewals: a third of the shortest lease
  #renewal: NodeJS.Timeout | undefined;
  #drain = () => {};
  #isDead = false;
  #sequence = 0n;

  constructor(host: Host) {
    this.#host = host;
    this.draining = new Promise((resolve) => (this.#drain = resolve));
    this.send({
      open: {
        queueId: host.queueId,
        workerId: host.workerId,
        leaseDuration: host.leaseDurationMs === undefined ? undefined : durationFromMs(host.leaseDurationMs),
      },
    });
    this.dead = this.#receive();
    this.#renewLater();
  }

  send(request: MessageInitShape<typeof StreamTasksRequestSchema>): void {
    this.#outgoing.push(create(StreamTasksRequestSchema, request));
  }

  breakOff(): void {
    this.#breaker.abort();
  }

  /** Keeps a lease while its work lasts. */
  hold(lease: Lease, work: (held: Held) => Promise<void>): void {
    const held = new Held(lease, this.#host);
    const done = work(held).finally(() => {
      held.drop();
      this.#held.delete(held);
    });
    this.#held.set(held, done);
    const third = Math.ceil(held.durationMs / 3);
    if (third >= this.#intervalMs) return;
    this.#intervalMs = third;
    this.#renewLater();
  }

  async #receive(): Promise<void> {
    const end = () => this.breakOff();
    this.#host.life.addEventListener("abort", end);
    try {
      const responses = this.#host.client.streamTasks(this.#outgoing, { signal: this.#breaker.signal });
      for await (const { event } of responses) {
        if (event.case === "leases") this.#begin(event.value.leases);
        else if (event.case === "settled") this.#answer(event.value);
        else if (event.case === "draining") this.#drain();
      }
    } catch (error) {
      this.failure = this.#why(RetinueError.from(error));
    }
    this.#host.life.removeEventListener("abort", end);
    this.#isDead = true;
    this.#outgoing.close();
    for (const resolve of this.#waiting.values()) resolve(undefined);
  }

  /**
   * An outcome that the server finds malformed ends the stream, too. That is no reason not to connect again, because
   * outcomes that are left are settled by calls, one by one.
   */
  #why(error: RetinueError): RetinueError {
    const malformed = error.code === Code.InvalidArgument && this.#waiting.size > 0;
    return malformed ? new RetinueError(error.message, Code.Aborted, error.reason) : error;
  }

  #begin(leases: Lease[]): void {
    if (!this.#host.take(this, leases)) void this.#giveBack(leases);
  }

  /** Releases what came after the worker stopped taking. */
  async #giveBack(leases: Lease[]): Promise<void> {
    const releases = leases.map(({ leaseToken }) => ({ leaseToken }));
    try {
      await this.#host.client.releaseTasks({ releases }, { timeoutMs: CALL_TIMEOUT_MS });
    } catch (error) {
      this.#host.log("unworked tasks were not given back and wait for their leases to expire", error);
    }
  }

  /** Sends a request that is answered by `settled`; undefined if the stream is dead. */
  #ask(request: MessageInitShape<typeof StreamTasksRequestSchema>): Promise<StreamSettled | undefined> {
    if (this.#isDead) return Promise.resolve(undefined);
    const sequence = ++this.#sequence;
    const answer = new Promise<StreamSettled | undefined>((resolve) => this.#waiting.set(sequence, resolve));
    this.send({ ...request, sequence } as MessageInitShape<typeof StreamTasksRequestSchema>);
    return answer;
  }

  #answer(settled: StreamSettled): void {
    this.#waiting.get(settled.sequence)?.(settled);
    this.#waiting.delete(settled.sequence);
  }

  /** Says one outcome: on the stream while it lives, else by a call. */
  async settle(outcome: Outcome, signal: AbortSignal): Promise<RetinueError | undefined> {
    const settled = await this.#ask(onStream(outcome));
    if (settled) return RetinueError.fromItem(settled.errors[0]?.status);
    return byCall(outcome, this.#host.client, { signal, timeoutMs: CALL_TIMEOUT_MS });
  }

  #renewLater(): void {
    clearTimeout(this.#renewal);
    this.#renewal = setTimeout(() => void this.#renew(), this.#intervalMs).unref();
  }

  /** Extends the leases at a third of their duration. Asking also shows a server that no longer answers. */
  async #renew(): Promise<void> {
    if (this.#host.soft.aborted || (this.#isDead && this.#held.size === 0)) return;
    const interval = this.#intervalMs;
    const held = [...this.#held.keys()];
    const sent = performance.now();
    const late = setTimeout(() => this.breakOff(), interval);
    const settled = await this.#ask({ extendAll: true });
    clearTimeout(late);
    if (settled) this.#prolong(held, sent, settled);
    else await this.#extendByCall(held, sent, interval);
    this.#renewLater();
  }

  #prolong(held: Held[], sent: number, settled: StreamSettled): void {
    const lost = new Set(settled.lostLeaseTokens.map(key));
    for (const one of held) {
      if (!this.#held.has(one)) continue; // settled meanwhile
      if (lost.has(key(one.lease.leaseToken))) {
        one.lose(new LeaseLost("cannot go on: the lease was lost"));
        continue;
      }
      one.prolong(sent + one.durationMs);
      if (settled.cancelRequestedTaskIds.includes(one.lease.taskId)) one.cancel();
    }
  }

  async #extendByCall(held: Held[], sent: number, timeoutMs: number): Promise<void> {
    for (let start = 0; start < held.length; start += 1000) {
      const part = held.slice(start, start + 1000);
      const extensions = part.map(({ lease }) => ({ leaseToken: lease.leaseToken }));
      try {
        const { results } = await this.#host.client.extendLeases({ extensions }, { timeoutMs });
        results.forEach((result, index) => this.#extended(part[index], result, sent));
      } catch (error) {
        this.#host.log("leases were not extended; trying again", error); // else they run out by themselves
      }
    }
  }

  #extended(held: Held | undefined, result: ExtendResult, sent: number): void {
    if (!held || !this.#held.has(held)) return;
    if (RetinueError.fromItem(result.status)) {
      held.lose(new LeaseLost("cannot go on: the lease was lost"));
      return;
    }
    held.prolong(sent + (result.leaseDuration ? durationMs(result.leaseDuration) : 0));
    if (result.cancelRequested) held.cancel();
  }

  /** Waits for the outcomes of this stream's leases, says that no more will come, and hears the server out. */
  async finish(): Promise<void> {
    await Promise.race([this.dead, Promise.all(this.#held.values())]);
    this.#outgoing.close();
    const late = setTimeout(() => this.breakOff(), LAST_WORDS_MS);
    await this.dead;
    clearTimeout(late);
  }
}

function key(token: Uint8Array): string {
  return Buffer.from(token).toString("base64");
}

/** Waits; less if the signal is aborted. */
export async function pause(ms: number, signal: AbortSignal): Promise<void> {
  if (signal.aborted) return;
  let end = () => {};
  const over = new Promise<void>((resolve) => (end = resolve));
  const timer = setTimeout(end, ms);
  signal.addEventListener("abort", end);
  await over;
  clearTimeout(timer);
  signal.removeEventListener("abort", end);
}
