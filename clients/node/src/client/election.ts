import { randomBytes } from "node:crypto";
import { hostname } from "node:os";
import type { Client } from "@connectrpc/connect";
import { Candidacy, type Served } from "./candidacy.js";
import type { RetinueError } from "./errors.js";
import { pause } from "./session.js";
import type { FencingToken, Leader } from "../retinue/leaderelection/v1/election_pb.js";
import type { LeaderElectionService } from "../retinue/leaderelection/v1/leaderelection_service_pb.js";

const REENTRY_MS = 2_000; // how long one that was asked to give up leadership lets others come first

/** The reason of a term's signal when the leadership is over or about to be: publish nothing. */
export class TermLost extends Error {
  override readonly name = "TermLost";

  constructor(
    readonly electionId: string,
    /**
     * DEADLINE (nothing renewed it in time), STEP_DOWN_REQUESTED, DRAINING (the server stops), UNHEALTHY, CONNECTION (the
     * server refused to go on), or the server's word: EXPIRED, ENGINE_LOST, APP_SILENT ...
     */
    readonly reason: string,
  ) {
    super(`cannot go on: the leadership of ${electionId} is lost [${reason}]`);
  }
}

/** What happened to a candidate. */
export type ElectionEvent =
  /** The server answered, for the first time or again. */
  | { kind: "connected" }
  /** The stream broke; another one is tried. */
  | { kind: "disconnected"; error: RetinueError }
  /** Who leads, as far as the server knows. */
  | { kind: "standby"; leader: Leader | undefined }
  /** The server can't renew; how long the leadership can last if that stays so. */
  | { kind: "atRisk"; remainingMs: number }
  /** The work should end: STEP_DOWN_REQUESTED or DRAINING. */
  | { kind: "asked"; reason: string };

export interface ElectionOptions {
  /** The server. */
  client: Client<typeof LeaderElectionService>;
  /** The election's name. */
  electionId: string;
  /** Unique in the election; by default it is made of host name, process id and something random. */
  candidateId?: string;
  /** What is proclaimed, such as an address, up to 4,096 characters. */
  value?: string;
  /** How soon others take over when the server is gone, 1 s to 10 min, by default what the server says (15 s). */
  leaseMs?: number;
  /**
   * How soon others take over when this process is gone, 100 ms to half of leaseMs, by default what the server says (2 s). An
   * event loop that stands still for longer loses its leadership.
   */
  appLeaseMs?: number;
  /** What others wait after a term that did not end by resignation, up to 10 min. */
  releaseDelayMs?: number;
  /** How long before the deadline the work is stopped, by default a tenth of appLeaseMs. */
  marginMs?: number;
  /** Leaves it to `listener` to stop the work when a step-down is asked for or the server stops. */
  keepOnRequest?: boolean;
  /** Is asked with each heartbeat; false gives leadership up, and does not stand. */
  healthy?: () => boolean;
  /** Hears what happens; it must not throw. */
  listener?: (event: ElectionEvent) => void;
  /** Gets resignations that fail; by default console.warn. */
  log?: (message: string, error?: unknown) => void;
}

/** One leadership. */
export interface Term {
  /** What the protected resource compares; the same for the whole term. */
  readonly token: FencingToken;
  /** For the work: it is aborted before the leadership ends. Its reason is then a TermLost. */
  readonly signal: AbortSignal;
  /** How long the leadership lasts if nothing is renewed; 0 = it is over. */
  readonly remainingMs: number;
  /** Whether the leadership is valid at this instant, without asking anybody: for work that holds up the event loop. */
  isLeader(): boolean;
  /** Publishes a value for those who look for the leader, up to 4,096 characters. Throws RetinueError. */
  proclaim(value: string): Promise<void>;
  /**
   * Ends the term when its work has stopped, and not before; the next candidate takes over at once. It must be called however
   * the work ended; it takes 2 s at most, never throws, and repeating it is safe. Gives whether a leadership was given on.
   */
  resign(): Promise<boolean>;
}

/**
 * One election, for those who want to lead it: work that runs while it leads and has ended before anybody else can lead.
 *
 * The one guarantee that covers an effect which arrives late is the token: whatever is protected must refuse a lower one than
 * the highest it has seen. Node has neither a boot clock nor file locks: deadlines are kept by the system's uptime, 20 ms
 * early, and nothing proves this process's death, so that others wait for appLeaseMs. An abort can't interrupt work that holds
 * up the event loop: such work belongs in a process of its own (`retinue elect`), or looks at `isLeader()`.
 */
export class Election {
  readonly client: Client<typeof LeaderElectionService>;
  readonly electionId: string;
  readonly candidateId: string;
  readonly value: string;
  readonly log: (message: string, error?: unknown) => void;

  constructor(readonly options: ElectionOptions) {
    this.client = options.client;
    this.electionId = options.electionId;
    this.candidateId = options.candidateId ?? newCandidateId();
    this.value = options.value ?? "";
    this.log = options.log ?? ((message, error) => console.warn(`retinue: ${message}`, error ?? ""));
  }

  /**
   * Stands for the election until it is won; resign() must then be called. When the signal is aborted it stops standing, or
   * the term's signal is aborted, too; the leadership goes on until resign(). It throws the signal's reason, or what the
   * server will always refuse; a server that can't be reached is waited for.
   */
  async campaign(signal?: AbortSignal): Promise<Term> {
    signal?.throwIfAborted();
    let enter = (_: Served) => {};
    const entered = new Promise<Served>((resolve) => (enter = resolve));
    const candidacy = new Candidacy(this, signal, enter);
    let giveUp = () => {};
    const givenUp = new Promise<void>((resolve) => (giveUp = () => resolve()));
    signal?.addEventListener("abort", giveUp);
    const term = await Promise.race([entered, candidacy.done, givenUp]);
    signal?.removeEventListener("abort", giveUp);
    if (term) return term;
    await candidacy.leave();
    throw candidacy.fatal ?? signal?.reason;
  }

  /**
   * Campaigns again and again, and does the work each time it leads, until the work ends by itself: gives what it gives, and
   * throws what it throws, or what campaign() does. When the term's signal is aborted the work must throw soon, such as the
   * signal's reason. Until it has ended, nobody else leads for this process.
   */
  async lead<T>(work: (term: Term) => Promise<T>, signal?: AbortSignal): Promise<T> {
    for (;;) {
      const term = await this.campaign(signal);
      try {
        return await work(term);
      } catch (error) {
        const lost: unknown = term.signal.reason;
        if (!(lost instanceof TermLost) || !isOurs(error)) throw error;
        await term.resign();
        if (lost.reason === "STEP_DOWN_REQUESTED" || lost.reason === "UNHEALTHY") await this.#letOthers(signal);
      } finally {
        await term.resign();
      }
    }
  }

  #letOthers(signal: AbortSignal | undefined): Promise<void> {
    return pause(REENTRY_MS, signal ?? new AbortController().signal);
  }

  isHealthy(): boolean {
    return this.options.healthy?.() ?? true;
  }

  tell(event: ElectionEvent): void {
    this.options.listener?.(event);
  }
}

function isOurs(error: unknown): boolean {
  return error instanceof TermLost || (error instanceof Error && error.name === "AbortError");
}

/** Unique per process, also when a restarted pod has its old name and pid. */
function newCandidateId(): string {
  const host = hostname().slice(0, 64).replace(/[^A-Za-z0-9._-]/g, "-").replace(/^[._-]+/, "");
  return `${host || "host"}-${process.pid}-${randomBytes(4).toString("hex")}`;
}
