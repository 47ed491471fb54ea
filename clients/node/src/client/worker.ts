import { randomBytes } from "node:crypto";
import { hostname } from "node:os";
import { Code, type Client } from "@connectrpc/connect";
import { RetinueError } from "./errors.js";
import { completion, Failure, failure, type Outcome, type Result } from "./outcome.js";
import { LAST_WORDS_MS, LeaseLost, pause, Session, TaskCancelled, type Held, type Host } from "./session.js";
import type { Lease } from "../retinue/workqueue/v1/task_pb.js";
import type { WorkQueueService } from "../retinue/workqueue/v1/workqueue_service_pb.js";

export { Failure, LeaseLost, TaskCancelled, type Result };

/** The reason of a handler's signal when the worker's grace is over. */
export class Stopping extends Error {
  override readonly name = "Stopping";
}

/** Thrown by a handler, gives the task back: the attempt is not counted. */
export class Release extends Error {
  override readonly name = "Release";
}

/**
 * Does one task.
 *
 * It must end soon after its signal is aborted. A result completes the task; after TaskCancelled or Stopping, whatever is
 * thrown gives it back. Otherwise what is thrown, if it is no Failure and no Release, is a failure that another attempt may
 * mend.
 */
export type Handler = (lease: Lease, signal: AbortSignal) => Promise<Result | void>;

export interface WorkerOptions {
  /** The server. */
  client: Client<typeof WorkQueueService>;
  /** The queue's name. */
  queueId: string;
  /** Does one task. */
  handle: Handler;
  /** Names the process, for people; by default it is made of host name, process id and something random. */
  workerId?: string;
  /** How many tasks are worked on at a time, up to 10,000, by default 1. */
  concurrency?: number;
  /** How long leases last, 1 s to 12 h in milliseconds, by default what the queue says. */
  leaseDurationMs?: number;
  /** How long handlers may go on after the worker was told to stop, in milliseconds, by default 30 s. */
  graceMs?: number;
  /** Gets lost leases, refused outcomes and broken streams; by default console.warn. */
  log?: (message: string, error?: unknown) => void;
}

const FIRST_WAIT_MS = 50;
const LONGEST_WAIT_MS = 2_000;

/**
 * Does the tasks of one queue over a StreamTasks stream: it renews leases at a third of their duration, aborts the handler
 * of a lost one, reconnects, and settles by calls what a broken stream left behind.
 */
export class Worker implements Host {
  readonly client: Client<typeof WorkQueueService>;
  readonly queueId: string;
  readonly workerId: string;
  readonly leaseDurationMs: number | undefined;
  readonly log: (message: string, error?: unknown) => void;
  readonly #handle: Handler;
  readonly #concurrency: number;
  readonly #graceMs: number;
  readonly #life = new AbortController(); // ends when nothing more may be sent
  readonly #soft = new AbortController(); // ends with the grace
  readonly #handlers = new Set<Promise<void>>();
  #session: Session | undefined; // the stream that gets credit
  #busy = 0; // leases that are not settled
  #promised = 0; // credit that the session was given and has not used

  constructor(options: WorkerOptions) {
    this.client = options.client;
    this.queueId = options.queueId;
    this.#handle = options.handle;
    const random = randomBytes(4).toString("hex");
    this.workerId = options.workerId ?? `${hostname().slice(0, 64)}-${process.pid}-${random}`;
    this.#concurrency = Math.min(Math.max(options.concurrency ?? 1, 1), 10_000);
    this.leaseDurationMs = options.leaseDurationMs;
    this.#graceMs = options.graceMs ?? 30_000;
    this.log = options.log ?? ((message, error) => console.warn(`retinue: ${message}`, error ?? ""));
  }

  get life(): AbortSignal {
    return this.#life.signal;
  }

  get soft(): AbortSignal {
    return this.#soft.signal;
  }

  /**
   * Works until the signal is aborted; then it takes no more tasks, gives handlers the grace to finish, and settles.
   * It throws only where trying again can't help, such as a missing right. A Worker runs once.
   */
  async run(signal: AbortSignal): Promise<void> {
    const timers: NodeJS.Timeout[] = [];
    const stop = () => {
      const reason = new Stopping("cannot go on: the worker is stopping");
      timers.push(setTimeout(() => this.#soft.abort(reason), this.#graceMs));
      timers.push(setTimeout(() => this.#life.abort(reason), this.#graceMs + LAST_WORDS_MS));
    };
    const running = new AbortController();
    running.signal.addEventListener("abort", stop, { once: true });
    const forward = () => running.abort();
    signal.addEventListener("abort", forward, { once: true });
    if (signal.aborted) forward();
    try {
      await this.#keepConnected(running.signal);
    } finally {
      forward();
      await Promise.all(this.#handlers);
      timers.forEach(clearTimeout);
      this.#soft.abort();
      signal.removeEventListener("abort", forward);
    }
  }

  async #keepConnected(running: AbortSignal): Promise<void> {
    let wait = FIRST_WAIT_MS;
    while (!running.aborted) {
      const began = performance.now();
      const error = await this.#runSession(running);
      if (error && !running.aborted) {
        if (error.permanent) throw error;
        this.log(`the stream of ${this.queueId} broke; connecting again`, error);
      }
      if (performance.now() - began > LONGEST_WAIT_MS) wait = FIRST_WAIT_MS;
      await pause(wait, running);
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  }

  /** Works over one stream until it breaks, the server drains, or the worker stops. */
  async #runSession(running: AbortSignal): Promise<RetinueError | undefined> {
    const session = new Session(this);
    this.#session = session;
    this.#promised = 0;
    this.#grant();
    const over = new AbortController();
    void session.dead.then(() => over.abort());
    void session.draining.then(() => over.abort());
    const stop = () => over.abort();
    running.addEventListener("abort", stop);
    await pause(2 ** 31 - 1, over.signal);
    running.removeEventListener("abort", stop);
    this.#session = undefined;
    await session.finish();
    return session.failure;
  }

  /** Gives the session as much credit as there are free hands. */
  #grant(): void {
    const credit = this.#concurrency - this.#busy - this.#promised;
    if (!this.#session || credit <= 0) return;
    this.#promised += credit;
    this.#session.send({ credit });
  }

  take(session: Session, leases: Lease[]): boolean {
    if (this.#session !== session) return false;
    this.#promised -= leases.length;
    this.#busy += leases.length;
    for (const lease of leases) session.hold(lease, (held) => this.#track(this.#work(session, held)));
    return true;
  }

  #track(work: Promise<void>): Promise<void> {
    this.#handlers.add(work);
    return work.finally(() => this.#handlers.delete(work));
  }

  async #work(session: Session, held: Held): Promise<void> {
    await this.#settle(session, held, await this.#outcome(held));
    this.#busy -= 1;
    this.#grant();
  }

  async #outcome({ lease, handler }: Held): Promise<Outcome> {
    try {
      return completion(lease.leaseToken, (await this.#handle(lease, handler.signal)) ?? undefined);
    } catch (error) {
      const { reason } = handler.signal;
      const back = error instanceof Release || reason instanceof TaskCancelled || reason instanceof Stopping;
      return back ? { release: { leaseToken: lease.leaseToken } } : failure(lease.leaseToken, error);
    }
  }

  /**
   * Says an outcome until it is durable or refused. A completion that is refused while the lease is still held, say for a
   * result that is too large, becomes a failure.
   */
  async #settle(session: Session, { lease, alive }: Held, outcome: Outcome): Promise<void> {
    let wait = FIRST_WAIT_MS;
    for (let tries = 1; !alive.signal.aborted; tries++) {
      const refusal = await session.settle(outcome, alive.signal);
      if (!refusal) return;
      if (refusal.passing(tries)) {
        await pause(wait, alive.signal);
        wait = Math.min(2 * wait, LONGEST_WAIT_MS);
      } else if ("completion" in outcome && !refusal.leaseOver) {
        const final = refusal.code === Code.InvalidArgument || refusal.reason === "PAYLOAD_TOO_LARGE";
        outcome = failure(lease.leaseToken, new Failure(refusal.reason, refusal.message, final));
      } else {
        this.log(`the outcome of task ${lease.taskId} was refused`, refusal);
        return;
      }
    }
    this.log(`the outcome of task ${lease.taskId} was not settled in time`, alive.signal.reason);
  }
}
