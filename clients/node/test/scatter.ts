// Asking a pool of a real server: RETINUE_ADDRESS is that of one whose pool "node" has shards a, b and c on sockets, and merges
// their best three hits. Leaves answer with their shard's name; "fail c" and "wait c" say what c does instead.
import assert from "node:assert/strict";
import { once } from "node:events";
import { after, test } from "node:test";
import { Answer, Code, connect, ConnectError, createClient, Leaf, Pool, RetinueError } from "retinue/client";
import type { LeafAnswer, Question } from "retinue/client";
import { ScatterGatherService } from "retinue/scattergather/v1/scattergather_service_pb";
import { TopologyService } from "retinue/scattergather/v1/topology_service_pb";

const brief = { timeout: 120_000 };
const encode = (text: string) => new TextEncoder().encode(text);
const client = createClient(ScatterGatherService, connect("scattergather"));
const pool = new Pool({ client, poolId: "node" });
const leaves: Leaf[] = [];
let waits = () => {};
let told = (_: unknown) => {};

const answer: LeafAnswer = async ({ shardId, payload }, { signal }) => {
  const asked = new TextDecoder().decode(payload);
  if (asked === `fail ${shardId}`) throw new ConnectError("the page is torn", Code.DataLoss);
  if (asked === `wait ${shardId}`) {
    waits();
    await once(signal, "abort");
    told(signal.reason);
    throw signal.reason;
  }
  return { payload: encode(JSON.stringify([{ id: `${shardId} ${asked}`, score: 1 }])) };
};

/** Serves every shard where the pool expects it, until the root is connected to all. */
async function serve(): Promise<void> {
  const topologies = createClient(TopologyService, connect("scattergather"));
  const leave = new AbortController();
  const seen = topologies.watchTopology({ poolId: "node" }, { signal: leave.signal });
  for await (const { pool } of seen) {
    const endpoints = pool!.shards.map((shard) => shard.endpoints[0]!);
    if (leaves.length > 0 && endpoints.every(({ connected }) => connected)) break;
    if (leaves.length > 0) continue;
    for (const { address } of endpoints) {
      const leaf = new Leaf({ answer });
      leaves.push(leaf);
      await leaf.listen(address);
    }
  }
  leave.abort();
}

await serve();
after(() => Promise.all(leaves.map((leaf) => leaf.stop())));

function ids(json: unknown): unknown[] {
  return (json as { id: unknown }[]).map(({ id }) => id);
}

async function asked(question: Question): Promise<unknown[]> {
  return ids((await pool.scatter(question)).json);
}

async function refused(call: Promise<unknown>): Promise<RetinueError> {
  const error = await call.then(() => assert.fail("it was not refused"), (error: unknown) => error);
  assert.ok(error instanceof RetinueError, String(error));
  return error;
}

/** What the pool's latest request ended with. */
async function lastCode(): Promise<number | undefined> {
  return (await client.listRecentScatters({ poolId: "node", pageSize: 1 })).scatters[0]?.code;
}

test("an answer of all shards is complete", brief, async () => {
  const answer = await pool.scatter({ payload: encode("x") });
  assert.equal(answer.complete, true);
  assert.equal(answer.coverage?.answered, 3n);
  assert.deepEqual(ids(answer.json), ["a x", "b x", "c x"]);
  assert.deepEqual([answer.payload, answer.replies, answer.failures], [undefined, [], []]);
});

test("a question selects shards", brief, async () => {
  assert.deepEqual(await asked({ inputs: { a: encode("x"), c: 7 } }), ["a x", "c 7"]);
  assert.deepEqual(await asked({ payload: encode("x"), shards: ["b"] }), ["b x"]);
  assert.equal((await asked({ payload: encode("x"), keys: ["a key"] })).length, 1);
});

test("a question may be a JSON value", brief, async () => {
  assert.deepEqual(await asked({ json: { word: "x" }, shards: ["b"] }), ['b {"word":"x"}']);
});

test("a scatter that fails tells what is missing", brief, async () => {
  const refusal = await refused(pool.scatter({ payload: encode("fail c") }));
  assert.equal(refusal.reason, "COVERAGE_NOT_MET");
  assert.equal(refusal.missing?.coverage?.expected, 3n);
  const lost = refusal.missing?.failures[0];
  assert.deepEqual([lost?.shardId, lost?.code, lost?.message], ["c", Code.DataLoss, "the page is torn"]);
  const unknown = await refused(new Pool({ client, poolId: "unknown" }).scatter({}));
  assert.deepEqual([unknown.reason, unknown.missing], ["POOL_NOT_FOUND", undefined]);
});

test("an answer is partial where the policy says so", brief, async () => {
  const answer = await pool.scatter({ payload: encode("fail c"), policy: { minCoverage: 0.5 } });
  assert.equal(answer.complete, false);
  assert.equal(answer.coverage?.answered, 2n);
  assert.deepEqual(answer.failures.map(({ shardId }) => shardId), ["c"]);
  assert.deepEqual(ids(answer.json), ["a fail c", "b fail c"]);
});

test("a stream tells of each shard and then of the answer", brief, async () => {
  const seen: (string | undefined)[] = [];
  for await (const event of pool.stream({ payload: encode("x") })) {
    if (event.case === "reply") seen.push(event.value.outcome?.shardId);
    if (event.case !== "answer") continue;
    assert.deepEqual(ids(new Answer(event.value).json), ["a x", "b x", "c x"]);
    assert.deepEqual(seen.splice(0).sort(), ["a", "b", "c"]);
    seen.push("answer");
  }
  assert.deepEqual(seen, ["answer"]);
});

test("an error is the last of a stream", brief, async () => {
  const drain = async () => {
    for await (const event of pool.stream({ payload: encode("fail c") })) assert.notEqual(event.case, "answer");
  };
  assert.equal((await refused(drain())).reason, "COVERAGE_NOT_MET");
});

test("who leaves the loop cancels the leaves", brief, async () => {
  const waiting = new Promise<void>((resolve) => (waits = resolve));
  const reason = new Promise<unknown>((resolve) => (told = resolve));
  for await (const _ of pool.stream({ payload: encode("wait c") })) {
    await waiting;
    break;
  }
  assert.equal(ConnectError.from(await reason).code, Code.Canceled);
  assert.equal(await lastCode(), Code.Canceled); // and not the deadline
});

test("who aborts the call cancels the leaves", brief, async () => {
  const caller = new AbortController();
  waits = () => caller.abort();
  const reason = new Promise<unknown>((resolve) => (told = resolve));
  const call = { signal: caller.signal };
  assert.equal((await refused(pool.scatter({ payload: encode("wait c") }, call))).code, Code.Canceled);
  assert.equal(ConnectError.from(await reason).code, Code.Canceled);
  assert.equal(await lastCode(), Code.Canceled);
  const events = pool.stream({ payload: encode("x") }, call)[Symbol.asyncIterator]();
  assert.equal((await refused(events.next())).code, Code.Canceled);
});
