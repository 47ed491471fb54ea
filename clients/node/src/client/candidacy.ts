import { create, equals, type MessageInitShape } from "@bufbuild/protobuf";
import { durationFromMs, durationMs } from "@bufbuild/protobuf/wkt";
import { Code } from "@connectrpc/connect";
import { Deadline } from "./deadline.js";
import { RetinueError } from "./errors.js";
import { Outgoing } from "./outgoing.js";
import { pause } from "./session.js";
import { TermLost, type Election, type Term } from "./election.js";
import {
  EndReason,
  FencingTokenSchema,
  type FencingToken,
  type Leadership,
} from "../retinue/leaderelection/v1/election_pb.js";
import {
  CampaignRequestSchema,
  CampaignStartSchema,
  type CampaignHeartbeatAck,
  type CampaignRequest,
  type CampaignResponse,
} from "../retinue/leaderelection/v1/leaderelection_service_pb.js";

const CONTRACT_LEASE_MS = 2_000; // what the contract gives those who ask for no app's lease
const BEATS = 4; // how many heartbeats fit into an app's lease
const [SHORTEST_LEASE_MS, LONGEST_LEASE_MS] = [100, 300_000];
const LEAST_SILENCE_MS = 1_000; // a stream that is silent for longer, and for a whole lease, is given up
const LONGEST_LOOK_MS = 250; // timers stand still while the machine is suspended
const [RESIGN_TIMEOUT_MS, GOODBYE_TIMEOUT_MS, RESIGN_AGAIN_MS] = [2_000, 250, 50];
const [FIRST_WAIT_MS, LONGEST_WAIT_MS] = [50, 2_000];
const REFUSALS = new Set([Code.AlreadyExists, Code.FailedPrecondition, Code.OutOfRange, Code.Aborted]);

/** One session: it outlives its streams, and gives one term at most. Heartbeats come from the event loop of the work. */
export class Candidacy {
  readonly deadline = new Deadline();
  /** Ends when no stream will be opened any more. */
  readonly done: Promise<void>;
  /** Why it ended, unless it was ended here. */
  fatal: RetinueError | undefined;
  /** The one that is served. */
  term: Served | undefined;
  readonly start;
  readonly #election: Election;
  readonly #parent: AbortSignal | undefined;
  readonly #life = new AbortController();
  readonly #entered: (term: Served) => void;
  #token: FencingToken | undefined; // of the term that the session leads
  #appLeaseMs: number;
  #answered = false; // on the present stream
  #refusedAt: number | undefined; // when the name was found taken first

  constructor(election: Election, parent: AbortSignal | undefined, entered: (term: Served) => void) {
    this.#election = election;
    this.#parent = parent;
    this.#entered = entered;
    const { electionId, candidateId, value } = election;
    const { leaseMs, appLeaseMs, releaseDelayMs } = election.options;
    this.start = create(CampaignStartSchema, {
      electionId,
      candidateId,
      value,
      leaseDuration: asked(leaseMs),
      appLeaseDuration: asked(appLeaseMs),
      releaseDelayDuration: asked(releaseDelayMs),
    });
    this.#appLeaseMs = appLeaseMs ?? CONTRACT_LEASE_MS;
    this.done = this.#run();
  }

  get #intervalMs(): number {
    return this.#appLeaseMs / BEATS;
  }

  /** How long before the deadline the work is stopped. */
  get #marginMs(): number {
    return this.#election.options.marginMs ?? this.#appLeaseMs / 10;
  }

  /** Opens a stream, and another one after each that is lost, until it is ended or the server refuses for good. */
  async #run(): Promise<void> {
    const life = this.#life.signal;
    for (let wait = FIRST_WAIT_MS; !life.aborted; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
      // `start` would count as the word of a healthy app.
      while (!life.aborted && !this.#election.isHealthy()) await pause(this.#intervalMs, life);
      this.#answered = false;
      const error = await this.#converse();
      if (life.aborted) return;
      if (!this.#goesOn(error)) {
        this.fatal = error;
        this.term?.stop("CONNECTION");
        return;
      }
      this.#election.tell({ kind: "disconnected", error });
      if (this.#answered) wait = FIRST_WAIT_MS;
      await pause(Math.min(wait * (0.5 + Math.random() / 2), this.#intervalMs), life);
    }
  }

  /**
   * Whether another stream may fare better. A process that was killed is a live candidate until its lease is over: its
   * successor of the same name waits for that.
   */
  #goesOn(error: RetinueError): boolean {
    if (error.reason === "CANDIDATE_EXISTS") {
      this.#refusedAt ??= this.deadline.now();
      return this.deadline.now() - this.#refusedAt < 2 * this.#appLeaseMs;
    }
    if (error.code === Code.Unavailable || error.retryAfterMs > 0) return true;
    const isRefusal = REFUSALS.has(error.code) && error.reason !== ""; // a cut connection has codes of that kind, too
    return !isRefusal && !error.permanent;
  }

  // One stream

  async #converse(): Promise<RetinueError> {
    const breaker = new AbortController();
    const breakOff = () => breaker.abort();
    this.#life.signal.addEventListener("abort", breakOff);
    const outgoing = new Outgoing<CampaignRequest>();
    const talking = this.#talk(outgoing, breaker.signal);
    const silence = new Silence(() => Math.max(this.#appLeaseMs, LEAST_SILENCE_MS), breakOff);
    try {
      const responses = this.#election.client.campaign(outgoing, { signal: breaker.signal });
      for await (const response of responses) {
        silence.broken();
        this.#hear(response);
      }
      return new RetinueError("the server ended the stream", Code.Canceled);
    } catch (error) {
      if (silence.kept) return new RetinueError("the server answers no heartbeats", Code.Unavailable);
      return RetinueError.from(error);
    } finally {
      silence.end();
      this.#life.signal.removeEventListener("abort", breakOff);
      breakOff();
      outgoing.close();
      await talking;
    }
  }

  /** Sends `start`, then heartbeats: each is stamped before it is sent. */
  async #talk(outgoing: Outgoing<CampaignRequest>, signal: AbortSignal): Promise<void> {
    const send = (message: MessageInitShape<typeof CampaignRequestSchema>["message"]) =>
      outgoing.push(create(CampaignRequestSchema, { message }));
    this.deadline.start();
    send({ case: "start", value: this.start });
    while (!signal.aborted) {
      const unhealthy = !this.#election.isHealthy();
      if (unhealthy) this.term?.stop("UNHEALTHY");
      send({ case: "heartbeat", value: { sequence: this.deadline.beat(), unhealthy } });
      await pause(this.#intervalMs, signal);
    }
  }

  #hear({ event }: CampaignResponse): void {
    if (this.#life.signal.aborted) return;
    if (!this.#answered) {
      this.#answered = true;
      this.#refusedAt = undefined;
      this.#election.tell({ kind: "connected" });
    }
    if (event.case === "heartbeatAck") this.#acknowledged(event.value);
    else if (event.case === "elected") this.#led(event.value);
    else if (event.case === "standby") {
      this.start.sessionId = event.value.sessionId;
      this.#election.tell({ kind: "standby", leader: event.value.leader });
    } else if (event.case === "atRisk") {
      const { remainingDuration } = event.value;
      this.#election.tell({ kind: "atRisk", remainingMs: remainingDuration ? durationMs(remainingDuration) : 0 });
    } else if (event.case === "stepDownRequested") this.#asked("STEP_DOWN_REQUESTED");
    else if (event.case === "draining") this.#asked("DRAINING");
    else if (event.case === "lost") this.#lost(EndReason[event.value.reason] ?? "UNKNOWN");
  }

  #led({ sessionId, token, sequence, validDuration }: Leadership): void {
    this.start.sessionId = sessionId;
    if (!token || !validDuration) return;
    if (!this.#token || !equals(FencingTokenSchema, this.#token, token)) {
      if (this.term) return this.#lost("EXPIRED"); // another term is for another campaign
      this.#token = token;
      this.deadline.reset();
    }
    this.#grant(sequence, durationMs(validDuration));
  }

  #acknowledged({ sequence, validDuration }: CampaignHeartbeatAck): void {
    if (this.#token && validDuration) this.#grant(sequence, durationMs(validDuration));
  }

  #grant(sequence: bigint, ms: number): void {
    this.deadline.grant(sequence, ms);
    if (this.#election.options.appLeaseMs === undefined) {
      // Then the server's answer tells: it has taken the guard, a tenth, off.
      this.#appLeaseMs = Math.min(Math.max(ms / 0.9, SHORTEST_LEASE_MS), LONGEST_LEASE_MS);
    }
    if (!this.term && this.deadline.remainingMs > this.#marginMs) this.#enter(); // it may have come late
  }

  // The term

  #enter(): void {
    this.term = new Served(this, this.#election, this.#token!, this.#parent);
    void this.#watch(this.term);
    this.#entered(this.term);
  }

  /** Stops the work before the deadline; past it the session ends, for nobody serves another term of it. */
  async #watch(term: Served): Promise<void> {
    while (!this.#life.signal.aborted) {
      const left = this.deadline.remainingMs;
      if (left <= this.#marginMs) term.stop("DEADLINE");
      if (left === 0) {
        term.over = true;
        return this.#life.abort();
      }
      const due = term.signal.aborted ? left : left - this.#marginMs;
      await pause(Math.min(due, LONGEST_LOOK_MS), this.#life.signal);
    }
  }

  #asked(reason: string): void {
    if (!this.term) return;
    this.#election.tell({ kind: "asked", reason });
    if (!this.#election.options.keepOnRequest) this.term.stop(reason);
  }

  #lost(reason: string): void {
    if (!this.term) return;
    this.term.over = true;
    this.term.stop(reason);
    this.#life.abort();
  }

  // After it

  /**
   * Ends the session, and with it the leadership if there is any left; the next candidate need not wait. A session that does
   * not lead resigns, too: or it might yet be elected, with nobody there.
   */
  async leave(): Promise<boolean> {
    const released = this.start.sessionId !== "" && (await this.#resign());
    this.#life.abort();
    await this.done;
    return released;
  }

  async #resign(): Promise<boolean> {
    const { client, log } = this.#election;
    const leads = () => this.term?.isLeader() ?? false;
    const timeoutMs = leads() ? Math.min(RESIGN_TIMEOUT_MS, this.deadline.remainingMs) : GOODBYE_TIMEOUT_MS;
    const signal = AbortSignal.timeout(Math.ceil(timeoutMs));
    for (;;) {
      let error: RetinueError | undefined;
      try {
        if ((await client.resign({ sessionId: this.start.sessionId }, { signal })).released) return true;
      } catch (thrown) {
        error = RetinueError.from(thrown);
      }
      // A server that has just started does not know the session yet.
      const again = leads() && !signal.aborted && (!error || error.code === Code.Unavailable);
      if (!again) {
        if (error) log(`not resigned, and so ${this.#election.electionId} passes on when its time is over`, error);
        return false;
      }
      await pause(RESIGN_AGAIN_MS, signal);
    }
  }
}

/** The term of a candidacy. */
export class Served implements Term {
  /** It is, whatever the deadline says. */
  over = false;
  readonly token: FencingToken;
  readonly #candidacy: Candidacy;
  readonly #election: Election;
  readonly #parent: AbortSignal | undefined;
  readonly #work = new AbortController();
  readonly #cancel = () => this.#work.abort(this.#parent?.reason);
  #resigned: Promise<boolean> | undefined;

  constructor(candidacy: Candidacy, election: Election, token: FencingToken, parent: AbortSignal | undefined) {
    this.#candidacy = candidacy;
    this.#election = election;
    this.token = token;
    this.#parent = parent;
    parent?.addEventListener("abort", this.#cancel);
    if (parent?.aborted) this.#cancel();
  }

  get signal(): AbortSignal {
    return this.#work.signal;
  }

  get remainingMs(): number {
    return this.over ? 0 : this.#candidacy.deadline.remainingMs;
  }

  isLeader(): boolean {
    return this.remainingMs > 0;
  }

  async proclaim(value: string): Promise<void> {
    const { start } = this.#candidacy;
    try {
      await this.#election.client.proclaim({ sessionId: start.sessionId, token: this.token, value });
    } catch (error) {
      throw RetinueError.from(error);
    }
    start.value = value;
  }

  resign(): Promise<boolean> {
    this.#resigned ??= this.#leave();
    return this.#resigned;
  }

  async #leave(): Promise<boolean> {
    this.#parent?.removeEventListener("abort", this.#cancel);
    const released = await this.#candidacy.leave();
    this.over = true;
    this.#work.abort();
    return released;
  }

  /** The first reason counts; after the work has ended, what is heard is the echo of our resignation. */
  stop(reason: string): void {
    if (!this.#resigned) this.#work.abort(new TermLost(this.#election.electionId, reason));
  }
}

/** Tells when nothing was heard for too long. */
class Silence {
  /** It was. */
  kept = false;
  #timer: NodeJS.Timeout | undefined;

  constructor(
    readonly longestMs: () => number,
    readonly tooLong: () => void,
  ) {
    this.broken();
  }

  broken(): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.kept = true;
      this.tooLong();
    }, this.longestMs());
  }

  end(): void {
    clearTimeout(this.#timer);
  }
}

function asked(ms: number | undefined) {
  return ms === undefined ? undefined : durationFromMs(ms);
}
