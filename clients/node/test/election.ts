// Leadership against a real server: RETINUE_ADDRESS is where apps dial it, RETINUE_CONTROL_ADDRESS where operators do.
import assert from "node:assert/strict";
import { once } from "node:events";
import * as net from "node:net";
import { after, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { address, connect, createClient, Election, RetinueError, TermLost } from "retinue/client";
import type { ElectionEvent, ElectionOptions, Term } from "retinue/client";
import { EndReason } from "retinue/leaderelection/v1/election_pb";
import { LeaderElectionService } from "retinue/leaderelection/v1/leaderelection_service_pb";

process.env["RETINUE_CONTROL_ADDRESS"] ?? assert.fail("cannot test: set RETINUE_ADDRESS and RETINUE_CONTROL_ADDRESS");
const operator = createClient(LeaderElectionService, connect("control")); // RETINUE_CONTROL_ADDRESS
const elections = createClient(LeaderElectionService, connect("leaderelection"));

/** A way to the server that a test can cut, or freeze: then it takes what is sent and gives nothing back. */
class Line {
  readonly #links = new Set<net.Socket>();
  readonly #relay = net.createServer((near) => this.#link(near));
  #isFrozen = false;

  async client() {
    await once(this.#relay.listen(0, "127.0.0.1"), "listening");
    after(() => (this.cut(), this.#relay.close()));
    const { port } = this.#relay.address() as net.AddressInfo;
    return createClient(LeaderElectionService, createGrpcTransport({ baseUrl: `http://127.0.0.1:${port}` }));
  }

  #link(near: net.Socket): void {
    const [host, port] = address("leaderelection").split(":");
    const far = net.connect(Number(port), host);
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      this.#links.add(from);
      from.on("error", () => to.destroy());
      from.on("close", () => this.#links.delete(from) && to.destroy());
      from.on("data", (data) => this.#isFrozen || to.write(data));
    }
  }

  freeze(): void {
    this.#isFrozen = true;
  }

  cut(): void {
    for (const socket of this.#links) socket.destroy();
  }
}

/** One election. */
class Poll {
  readonly electionId: string;
  readonly #life = new AbortController();

  constructor(name: string) {
    this.electionId = `node-${name.replaceAll(/[^A-Za-z]/g, "-")}-${process.hrtime.bigint()}`;
  }

  /** A candidate whose engine's lease is far longer than the app's: who waits for the former is seen to. */
  candidate(candidateId: string, options: Partial<ElectionOptions> = {}): Election {
    const { electionId } = this;
    return new Election({ client: elections, electionId, candidateId, leaseMs: 60_000, appLeaseMs: 30_000, ...options });
  }

  /** Elects one; it resigns when the test ends, if not before. */
  async elect(candidateId: string, options: Partial<ElectionOptions> = {}): Promise<Term> {
    const term = await this.candidate(candidateId, options).campaign(this.#life.signal);
    this.#life.signal.addEventListener("abort", () => void term.resign());
    return term;
  }

  /** Has a candidate stand by; what comes later is its term. */
  async wait(candidateId: string): Promise<{ term: Promise<Term> }> {
    const { heard, listener } = ear("standby");
    const term = this.elect(candidateId, { listener });
    term.catch(() => {}); // the test ends before it is elected
    await heard();
    return { term };
  }

  /** Why the terms ended, the latest first. */
  async reasons(): Promise<(string | undefined)[]> {
    const { terms } = await elections.listTerms({ electionId: this.electionId });
    return terms.map(({ endReason }) => EndReason[endReason]);
  }

  close(): void {
    this.#life.abort();
  }
}

/** A listener, and a function that waits for the next event of a kind. */
function ear(kind: ElectionEvent["kind"]) {
  let count = 0;
  let tell = () => {};
  const listener = (event: ElectionEvent) => {
    if (event.kind !== kind) return;
    count += 1;
    tell();
  };
  const heard = async () => {
    if (count === 0) await new Promise<void>((resolve) => (tell = resolve));
    count -= 1;
  };
  return { heard, listener };
}

/** Why a term's work had to stop. */
async function stopped({ signal }: Term): Promise<string> {
  if (!signal.aborted) await once(signal, "abort");
  assert.ok(signal.reason instanceof TermLost, String(signal.reason));
  return signal.reason.reason;
}

async function refused(call: Promise<unknown>): Promise<RetinueError> {
  try {
    await call;
  } catch (error) {
    return RetinueError.from(error);
  }
  return assert.fail("it was not refused");
}

function claim(name: string, body: (poll: Poll) => Promise<void>): void {
  test(name, { timeout: 120_000 }, async () => {
    const poll = new Poll(name);
    try {
      await body(poll);
    } finally {
      poll.close();
    }
  });
}

claim("heartbeats carry a term over many leases", async (poll) => {
  const term = await poll.elect("first", { appLeaseMs: 2000 });
  await sleep(5000);
  assert.ok(term.isLeader());
  assert.equal(term.signal.aborted, false);
  assert.ok(term.remainingMs <= 1780); // a tenth and the guard are off
});

claim("the next leads when the work has ended, under a higher token", async (poll) => {
  const first = await poll.elect("first"); // its lease is longer than anybody waits here
  const next = await poll.wait("second");
  assert.equal(await first.resign(), true);
  assert.equal(first.isLeader(), false);
  assert.equal(first.signal.reason instanceof TermLost, false);
  const second = await next.term;
  assert.ok(second.token.value > first.token.value);
  assert.equal(second.token.domain, first.token.domain);
  await second.resign();
  assert.deepEqual(await poll.reasons(), ["RESIGNED", "RESIGNED"]);
});

claim("a leader whose connection is cut goes on under its token", async (poll) => {
  const line = new Line();
  const { heard, listener } = ear("connected");
  const term = await poll.elect("first", { client: await line.client(), appLeaseMs: 6000, listener });
  await heard();
  for (let cuts = 0; cuts < 3; cuts++) {
    line.cut();
    await heard();
  }
  await sleep(7000); // what was granted before is over
  assert.ok(term.isLeader());
  assert.equal(term.signal.aborted, false);
  await elections.verifyToken({ electionId: poll.electionId, token: term.token });
});

claim("work that nothing renews is stopped before anyone else leads", async (poll) => {
  const line = new Line();
  const log = () => {};
  const client = await line.client();
  const term = await poll.elect("first", { client, appLeaseMs: 6000, marginMs: 3000, log });
  const next = await poll.wait("second");
  line.freeze();
  assert.equal(await stopped(term), "DEADLINE");
  assert.ok(term.isLeader());
  const second = await next.term;
  assert.equal(term.isLeader(), false);
  await second.resign();
  assert.deepEqual(await poll.reasons(), ["RESIGNED", "APP_SILENT"]);
});

claim("one that is asked to step down lets others come first, and leads again", async (poll) => {
  const led: Term[] = [];
  const end = new AbortController();
  const { heard, listener } = ear("connected");
  const over = poll.candidate("first", { listener }).lead(async (term) => {
    led.push(term);
    await once(term.signal, "abort");
    throw term.signal.reason;
  }, end.signal);
  await heard();
  while (led.length < 1) await sleep(10);
  const next = await poll.wait("second");
  await operator.requestStepDown({ electionId: poll.electionId, token: led[0]!.token });
  assert.equal(await stopped(led[0]!), "STEP_DOWN_REQUESTED");
  const second = await next.term;
  assert.deepEqual(await poll.reasons(), ["UNSPECIFIED", "STEPPED_DOWN"]);
  await second.resign();
  while (led.length < 2) await sleep(10);
  assert.ok(led[1]!.token.value > second.token.value);
  end.abort(new Error("enough"));
  await assert.rejects(over, /enough/);
});

claim("an app that is not well gives leadership up", async (poll) => {
  let isWell = true;
  const term = await poll.elect("first", { healthy: () => isWell });
  const next = await poll.wait("second");
  isWell = false;
  assert.equal(await stopped(term), "UNHEALTHY");
  await (await next.term).resign();
  assert.deepEqual(await poll.reasons(), ["RESIGNED", "UNHEALTHY"]);
});

claim("an event loop that stands still loses its leadership", async (poll) => {
  const term = await poll.elect("first", { appLeaseMs: 300 });
  const until = performance.now() + 400;
  while (performance.now() < until); // nothing renews
  assert.equal(term.isLeader(), false);
  assert.equal(await stopped(term), "DEADLINE");
});

claim("a candidate that gives up is never elected", async (poll) => {
  const first = await poll.elect("first");
  const enough = new AbortController();
  const { heard, listener } = ear("standby");
  const impatient = poll.candidate("impatient", { listener }).campaign(enough.signal);
  void heard().then(() => enough.abort(new Error("enough")));
  await assert.rejects(impatient, /enough/);
  await first.resign();
  assert.equal((await poll.elect("last")).token.value, first.token.value + 1n);
});

claim("work whose caller stops is stopped, and leads until it resigns", async (poll) => {
  const caller = new AbortController();
  const term = await poll.candidate("first", { appLeaseMs: 2000 }).campaign(caller.signal);
  caller.abort(new Error("enough"));
  assert.equal(term.signal.reason, caller.signal.reason);
  await sleep(4000); // two leases, while the work comes to its end
  assert.ok(term.isLeader());
  assert.equal(await term.resign(), true);
});

claim("lead gives and throws what its work does, and gives the election on", async (poll) => {
  assert.equal(await poll.candidate("first").lead(async () => "done"), "done");
  const broken = poll.candidate("first", { appLeaseMs: 30_000 }).lead(async () => {
    throw new Error("broken");
  });
  await assert.rejects(broken, /broken/);
  assert.deepEqual(await poll.reasons(), ["RESIGNED", "RESIGNED"]);
});

claim("a candidate that can never stand says so", async (poll) => {
  await poll.elect("first");
  const taken = await refused(poll.candidate("first", { appLeaseMs: 300 }).campaign());
  assert.equal(taken.reason, "CANDIDATE_EXISTS");
  const nonsense = await refused(poll.candidate("no spaces, please", { appLeaseMs: 3_600_000 }).campaign());
  assert.equal(nonsense.reason, "INVALID_FIELD");
  assert.equal(nonsense.fields.length, 2);
});
