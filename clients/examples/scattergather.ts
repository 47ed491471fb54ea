// Scatter/gather from end to end; prints clients/transcripts/scattergather.txt. It asks a pool and serves the pool's leaves
// itself, at the addresses that the root expects them at.
// In clients/node, with a root that has the pools of clients/examples/scattergather.yaml:
// npm ci && npm run build && node dist/examples/scattergather.js
import { once } from "node:events";
import { Answer, Code, connect, ConnectError, createClient, Leaf, Pool, RetinueError } from "retinue/client";
import type { ConnectRouter, LeafAnswer, Question } from "retinue/client";
import { AttemptOutcome, type Coverage, type ShardOutcome } from "retinue/scattergather/v1/coverage_pb";
import { MergeService, type MergeRequest } from "retinue/scattergather/v1/merge_service_pb";
import { ScatterGatherService } from "retinue/scattergather/v1/scattergather_service_pb";
import { Merge, type Shard } from "retinue/scattergather/v1/topology_pb";
import { TopologyService } from "retinue/scattergather/v1/topology_service_pb";

interface Hit {
  id: string;
  score: number;
  shelf: string;
}

const TIMEOUT_MS = 10_000;
const SHELVES: Record<string, Record<string, string>> = {
  a: { "Moby Dick": "sea whale ship sea", Emma: "ball letter walk" },
  b: { "Treasure Island": "sea map ship", Dracula: "letter castle ship" },
  c: { Odyssey: "sea ship sea home sea", Walden: "pond walk" },
};
const SEA = { word: "sea" };
const root = createClient(ScatterGatherService, connect("scattergather"));
const topologies = createClient(TopologyService, connect("scattergather"));

/** A leaf: it finds the books of its shelf that have the word `word`, most often first; the shelf `hangs` hangs. */
class Shelf {
  readonly told: Promise<boolean>;
  remainingMs = TIMEOUT_MS;
  #leaf: Leaf | undefined;
  #tell = (_: boolean) => {};

  constructor(readonly name: string) {
    this.told = new Promise((resolve) => (this.#tell = resolve)); // when nobody waits for its answer any more
  }

  readonly #answer: LeafAnswer = async ({ payload }, { signal, remainingMs }) => {
    const { word, hangs } = decode(payload) as { word: string; hangs?: string };
    if (!word) throw new ConnectError("a word is needed", Code.InvalidArgument);
    this.remainingMs = remainingMs ?? TIMEOUT_MS;
    if (hangs === this.name) {
      await once(signal, "abort");
      this.#tell(true);
      throw signal.reason;
    }
    return { payload: encode(this.#find(word)) };
  };

  #find(word: string): Hit[] {
    return Object.entries(SHELVES[this.name]!)
      .map(([id, text]) => ({ id, score: text.split(" ").filter((one) => one === word).length, shelf: this.name }))
      .filter(({ score }) => score > 0)
      .sort((one, other) => other.score - one.score);
  }

  /** Serves it where the root expects it; the shelf a has the merge beside it. */
  async serve(address: string): Promise<void> {
    const merge = (router: ConnectRouter) => void router.service(MergeService, { merge: fuse });
    this.#leaf = new Leaf({ answer: this.#answer, routes: this.name === "a" ? merge : undefined });
    await this.#leaf.listen(address);
  }

  async stop(): Promise<void> {
    await this.#leaf?.stop();
  }
}

/** A merge: the titles that were found, in their order. */
function fuse({ replies, coverage }: MergeRequest) {
  const titles = replies.flatMap(({ payload }) => decode(payload) as Hit[]).map(({ id }) => id);
  return { payload: new TextEncoder().encode(`${covered(coverage)} shelves have ${titles.sort().join(", ")}`) };
}

async function main(poolId: string): Promise<void> {
  const pool = new Pool({ client: root, poolId });
  const addresses = await expected(poolId);
  await nobody(pool, poolId);
  const shelves = new Map([...addresses.keys()].map((name) => [name, new Shelf(name)]));
  for (const [name, shelf] of shelves) await shelf.serve(addresses.get(name)!);
  await connected(`${poolId}-merged`, "a, b, c");
  console.log(`all are served; connected: ${await connected(poolId, "a, b, c")}`);
  await ask(pool, [...shelves.values()]);
  await askOtherWays(pool, poolId);
  await refuse(pool);
  await hang(pool, shelves.get("c")!);
  await lose(pool, poolId, shelves.get("c")!, addresses.get("c")!);
  for (const shelf of shelves.values()) await shelf.stop();
}

/** Whom the root expects where: for each shard an address. */
async function expected(poolId: string): Promise<Map<string, string>> {
  const { shards, merge, topK } = (await topologies.getTopology({ poolId })).pool!;
  console.log(`the pool expects ${names(shards)}, merges by ${Merge[merge]} the best ${topK}`);
  return new Map(shards.map(({ shardId, endpoints }) => [shardId, endpoints[0]!.address]));
}

/** Waits until the root is connected to these shards and no others. */
async function connected(poolId: string, wanted: string): Promise<string> {
  const enough = new AbortController();
  for await (const { pool } of topologies.watchTopology({ poolId }, { signal: enough.signal })) {
    const shown = names(pool!.shards.filter(({ endpoints }) => endpoints[0]?.connected)) || "none";
    if (shown !== wanted) continue;
    enough.abort();
    return shown;
  }
  throw new Error("the pool is gone");
}

function names(shards: Shard[]): string {
  return shards.map(({ shardId }) => shardId).join(", ");
}

async function nobody(pool: Pool, poolId: string): Promise<void> {
  console.log(`nobody serves it; connected: ${await connected(poolId, "none")}`);
  console.log(`asked for sea: ${told(await refused(pool, { json: SEA }))}`);
}

async function ask(pool: Pool, shelves: Shelf[]): Promise<void> {
  await show("asked for sea", pool, { json: SEA });
  const less = shelves.every(({ remainingMs }) => 0 < remainingMs && remainingMs < TIMEOUT_MS);
  console.log(`each leaf had less time than we gave: ${less}`);
  await show("asked shelf b alone for ship", pool, { json: { word: "ship" }, shards: ["b"] });
  await show("asked a for whale and c for pond", pool, { inputs: { a: { word: "whale" }, c: { word: "pond" } } });
}

async function askOtherWays(pool: Pool, poolId: string): Promise<void> {
  const plan = await root.explainScatter({ request: { poolId, routeKeys: ["cyd"] } });
  const [hit] = hits(await scatter(pool, { json: { word: "ship" }, keys: ["cyd"] }));
  console.log(`routed by the key cyd: ${names(plan.shards)} would be asked, ${hit?.shelf} answered`);
  await stream(pool);
  const merged = await scatter(new Pool({ client: root, poolId: `${poolId}-merged` }), { json: SEA });
  console.log(`merged by a service of ours: ${new TextDecoder().decode(merged.payload)}`);
}

async function stream(pool: Pool): Promise<void> {
  const replied: (string | undefined)[] = [];
  for await (const { case: kind, value } of pool.stream({ json: SEA })) {
    if (kind === "reply") replied.push(value.outcome?.shardId);
    if (kind !== "answer") continue;
    console.log(`streamed: ${replied.sort().join(", ")} replied, then came the answer: ${state(new Answer(value))}`);
  }
}

async function refuse(pool: Pool): Promise<void> {
  const nonsense = new Pool({ client: root, poolId: "no spaces, please" });
  const wrong = await refused(nonsense, { json: SEA, policy: { minCoverage: 2, firstK: -1 } });
  console.log(`asked with nonsense: ${told(wrong)}`);
  for (const path of wrong.fields.map((field) => field.path).sort()) console.log(`  ${path}`);
  const unknown = await refused(new Pool({ client: root, poolId: "nobody-knows" }), { json: SEA });
  console.log(`asked a pool that nobody knows: ${told(unknown)}`);
  const refusal = await refused(pool, { json: { word: "" } });
  console.log(`asked for no word: ${told(refusal)}: ${refusal.message}`);
}

async function hang(pool: Pool, shelf: Shelf): Promise<void> {
  const question = { json: { ...SEA, hangs: "c" }, policy: { minCoverage: 0.5, firstK: 2 } };
  const { scatterId } = (await show("asked for the first two, c hangs", pool, question)).response;
  console.log(`c was told that nobody waits for it: ${await shelf.told}`);
  const attempts = (await root.listRecentScatters({ scatterId })).scatters.flatMap((one) => one.attempts);
  const outcomes = attempts.map(({ shardId, outcome }) => `${shardId} ${AttemptOutcome[outcome]}`);
  console.log(`remembered of it: ${outcomes.sort().join(", ")}`);
}

async function lose(pool: Pool, poolId: string, shelf: Shelf, address: string): Promise<void> {
  await shelf.stop();
  console.log(`c stops; connected: ${await connected(poolId, "a, b")}`);
  console.log(`asked for sea: ${missed(await refused(pool, { json: SEA }))}`);
  await show("asked for sea, two thirds are enough", pool, { json: SEA, policy: { minCoverage: 0.66 } });
  const refusal = await refused(pool, { json: SEA, policy: { minCoverage: 0.9 } });
  console.log(`asked for sea, nine tenths are enough: ${missed(refusal)}`);
  await shelf.serve(address);
  console.log(`c is back; connected: ${await connected(poolId, "a, b, c")}`);
  await show("asked for sea", pool, { json: SEA });
}

function scatter(pool: Pool, question: Question): Promise<Answer> {
  return pool.scatter(question, { timeoutMs: TIMEOUT_MS });
}

async function refused(pool: Pool, question: Question): Promise<RetinueError> {
  try {
    await scatter(pool, question);
  } catch (error) {
    return RetinueError.from(error);
  }
  throw new Error("it was not refused");
}

async function show(what: string, pool: Pool, question: Question): Promise<Answer> {
  const answer = await scatter(pool, question);
  console.log(`${what}: ${state(answer)}`);
  for (const { score, id, shelf } of hits(answer)) console.log(`  ${score} ${id}, shelf ${shelf}`);
  return answer;
}

function hits(answer: Answer): Hit[] {
  return answer.json as unknown as Hit[];
}

function state({ complete, coverage, failures }: Answer): string {
  return `${complete ? "complete" : "partial"}, ${covered(coverage)}${without(failures)}`;
}

function covered(coverage: Coverage | undefined): string {
  return `${coverage?.answered} of ${coverage?.expected}`;
}

function without(failures: ShardOutcome[]): string {
  return failures.map(({ shardId, code }) => `, without ${shardId} (${new RetinueError("", code).codeName})`).join("");
}

function told(refusal: RetinueError): string {
  return `${refusal.codeName} ${refusal.reason}`;
}

/** With the shards that failed; others were not waited for any more. */
function missed(refusal: RetinueError): string {
  return told(refusal) + without(refusal.missing?.failures.filter(({ code }) => code !== Code.Canceled) ?? []);
}

function encode(value: unknown): Uint8Array {
  return new TextEncoder().encode(JSON.stringify(value));
}

function decode(payload: Uint8Array): unknown {
  return JSON.parse(new TextDecoder().decode(payload));
}

await main(process.argv[2] ?? "transcript");
