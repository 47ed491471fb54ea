// The ambassador from end to end; prints clients/transcripts/ambassador.txt. It declares upstreams over servers of its own and
// uses them as any app would: by ports of localhost. Give another name to run it twice: counts stay.
// In clients/node, with RETINUE_CONTROL_ADDRESS set to the control socket of an ambassador that has Envoy and may dial loopback,
// as that of `make run` may: npm ci && npm run build && node dist/examples/ambassador.js
import { once } from "node:events";
import * as http from "node:http";
import type { AddressInfo } from "node:net";
import { Ambassador, connect, createClient, RetinueError, upstream } from "retinue/client";
import { AmbassadorService, type WatchUpstreamsResponse } from "retinue/ambassador/v1/ambassador_service_pb";
import { RetryCondition } from "retinue/ambassador/v1/policy_pb";
import type { UpstreamStats } from "retinue/ambassador/v1/stats_pb";
import { Protocol, UpstreamState, type Upstream } from "retinue/ambassador/v1/upstream_pb";

const WAIT_MS = 20_000; // for what takes a moment
const ASKED = 9n + 12n; // how many requests are counted
const CANARY = { "x-canary": "1" };

type Weights = Record<string, number>;
type Part = { upstreamId: string; percent?: number; header?: { name: string } };

/** What stands behind: it answers with its name; nothing is at `/nowhere`, and `/held` waits until it is released. */
class Server {
  address = "";
  readonly held: Promise<void>;
  release = () => {};
  readonly #released = new Promise<void>((resolve) => (this.release = resolve));
  readonly #server = http.createServer((request, response) => this.#answer(request.url, response));
  #hold = () => {};

  constructor(readonly name: string) {
    this.held = new Promise((resolve) => (this.#hold = resolve));
  }

  async #answer(path: string | undefined, response: http.ServerResponse): Promise<void> {
    if (path === "/held") {
      this.#hold();
      await this.#released;
    }
    response.writeHead(path === "/nowhere" ? 404 : 200).end(this.name);
  }

  async start(): Promise<void> {
    await once(this.#server.listen(0, "127.0.0.1"), "listening");
    this.address = `127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
  }

  stop(): void {
    this.#server.close();
    this.#server.closeAllConnections();
  }
}

/** The upstream of the story, and who has to do with it. */
class Shop {
  readonly app = new Ambassador({ client: createClient(AmbassadorService, connect("ambassador")) });
  readonly operator = new Ambassador({ client: createClient(AmbassadorService, connect("control")) });
  readonly servers = new Map<string, Server>();
  readonly id: string;
  readonly canaryId: string;
  address = "";
  etag = "";

  constructor(name: string) {
    this.id = `${name}-shop`;
    this.canaryId = `${name}-canary`;
  }

  server(name: string): Server {
    return this.servers.get(name)!;
  }

  /** It over these servers; a request that did not reach one is tried at another. */
  wanted(weights: Weights, ...splits: Part[]) {
    const endpoints = Object.entries(weights).map(([name, weight]) => ({ address: this.server(name).address, weight }));
    const retry = { on: [RetryCondition.CONNECT_FAILURE, RetryCondition.RESET] };
    return {
      upstreamId: this.id,
      protocol: Protocol.HTTP,
      discovery: { case: "static" as const, value: { endpoints } },
      policy: { retry, splits },
    };
  }

  async declare(weights: Weights, ...splits: Part[]): Promise<Upstream> {
    const found = await this.operator.declare(this.wanted(weights, ...splits), { waitMs: WAIT_MS });
    this.address = found.status!.address;
    this.etag = found.etag;
    return found;
  }

  /** Asks as any app does: it knows nothing but a port of localhost. */
  async get(path = "/", headers: http.OutgoingHttpHeaders = {}): Promise<{ status: number; text: string }> {
    const oneConnection = { agent: false, timeout: WAIT_MS };
    const request = http.get(`http://${this.address}${path}`, { headers, ...oneConnection });
    const [answer] = (await once(request, "response")) as [http.IncomingMessage];
    let text = "";
    for await (const piece of answer.setEncoding("utf8")) text += piece;
    return { status: answer.statusCode!, text };
  }

  /** Asks many times: who answered how many. */
  async tally(requests: number, headers?: http.OutgoingHttpHeaders): Promise<string> {
    const counts: Record<string, number> = {};
    for (let i = 0; i < requests; i++) {
      const { status, text } = await this.get("/", headers);
      const who = status === 200 ? text : String(status);
      counts[who] = (counts[who] ?? 0) + 1;
    }
    return shares(counts);
  }
}

type Watching = AsyncGenerator<WatchUpstreamsResponse["event"]>;

async function main(name: string): Promise<void> {
  const shop = new Shop(name);
  for (const letter of "abcd") {
    const server = new Server(letter);
    await server.start();
    shop.servers.set(letter, server);
  }
  const watching = shop.app.watch([shop.id]);
  await look(shop);
  await refuse(shop);
  await declare(shop, watching);
  await weigh(shop);
  await split(shop);
  await change(shop);
  await lose(shop);
  await drain(shop, watching);
  await remove(shop, watching);
  await watching.return(undefined);
  for (const server of shop.servers.values()) server.stop();
}

async function look({ app }: Shop): Promise<void> {
  const capabilities = (await app.dataPlanes()).flatMap((plane) => plane.capabilities);
  const splits = capabilities.filter(({ name }) => name === "policy.splits").map(({ protocol }) => protocol);
  console.log(`HTTP can be split: ${splits.includes(Protocol.HTTP)}, TCP: ${splits.includes(Protocol.TCP)}`);
}

async function refuse(shop: Shop): Promise<void> {
  console.log(`an app declares: ${told(await refused(shop.app.declare(shop.wanted({ a: 1 }))))}`);
  const nonsense = upstream(shop.id, Protocol.TCP, ["example.com:80"], 70_000);
  const policy = { mirror: { upstreamId: shop.canaryId } };
  const wrong = await refused(shop.operator.declare({ ...nonsense, policy }));
  console.log(`declared nonsense: ${told(wrong)}`);
  for (const path of wrong.fields.map((field) => field.path).sort()) console.log(`  ${path}`);
  const cache = upstream(shop.id, Protocol.MEMCACHED, ["10.0.0.1:11211"]);
  const missing = await refused(shop.operator.declare({ ...cache, policy: { rateLimit: { requests: 100 } } }));
  console.log(`declared what nobody can do: ${told(missing)}: ${missing.metadata["capability"]} of MEMCACHED`);
  let message = "";
  for (const address of ["169.254.169.254:80", "[::ffff:169.254.169.254]:80"]) {
    const forbidden = await refused(shop.operator.declare(upstream(shop.id, Protocol.HTTP, [address])));
    console.log(`declared over ${address}: ${told(forbidden)}`);
    message = forbidden.message;
  }
  console.log(`  ${message}`);
  console.log(`nothing came of it: ${told(await refused(shop.app.get(shop.id)))}`);
}

async function declare(shop: Shop, watching: Watching): Promise<void> {
  await watching.next(); // all there are were told: it is not among them
  const waited = shop.app.wait([shop.id], { timeoutMs: WAIT_MS });
  const first = await shop.declare({ a: 1, b: 1, c: 1 });
  await waited;
  const local = shop.address.startsWith("127.0.0.1:");
  console.log(`declared over a, b, c: ${state(first)}, on localhost: ${local}; an app that waited goes on`);
  console.log(`the app sees it: ${await seen(watching, UpstreamState.ACTIVE)}`);
  console.log(`9 requests: ${await shop.tally(9)}`);
  const again = await shop.declare({ a: 1, b: 1, c: 1 });
  console.log(`declared again: nothing changes: ${again.etag === first.etag}`);
}

async function weigh(shop: Shop): Promise<void> {
  const { address: before, etag } = shop;
  await shop.declare({ a: 2, b: 1, c: 1 });
  console.log(`a weighs 2, at the same address: ${shop.address === before}`);
  console.log(`12 requests: ${await shop.tally(12)}`);
  const stale = shop.operator.declare(shop.wanted({ a: 1 }), { etag });
  console.log(`declared by the etag from before: ${told(await refused(stale))}`);
  const all = ({ endpoints }: UpstreamStats) => endpoints.reduce((sum, { requests }) => sum + requests, 0n);
  const counted = await stats(shop, (counted) => counted.requests >= ASKED && all(counted) >= ASKED);
  const names = new Map([...shop.servers.values()].map(({ name, address }) => [address, name]));
  const counts = counted.endpoints.map(({ address, requests }) => [names.get(address), requests]);
  console.log(`counted: ${counted.requests} requests, ${counted.errors} errors; ${shares(Object.fromEntries(counts))}`);
}

/** Waits until so much is counted. */
async function stats(shop: Shop, enough: (counted: UpstreamStats) => boolean): Promise<UpstreamStats> {
  for await (const [counted] of shop.app.stats([shop.id], { intervalMs: 100 })) {
    if (counted && enough(counted)) return counted;
  }
  throw new Error("the stats ended");
}

async function split(shop: Shop): Promise<void> {
  const some = { upstreamId: shop.canaryId, header: { name: "x-canary" } };
  const unknown = shop.operator.declare(shop.wanted({ a: 1 }, some));
  console.log(`split to one that is not there: ${told(await refused(unknown))}`);
  const other = upstream(shop.canaryId, Protocol.HTTP, [shop.server("d").address]);
  await shop.operator.declare(other);
  await shop.app.wait([shop.canaryId], { timeoutMs: WAIT_MS });
  await shop.declare({ a: 1, b: 1, c: 1 }, some);
  console.log(`split by a header: 9 requests with it: ${await shop.tally(9, CANARY)}`);
  console.log(`9 without it: ${await shop.tally(9)}`);
  const found = await shop.app.invoke(shop.id, "/", { headers: CANARY });
  const missing = await shop.app.invoke(shop.id, "/nowhere", { headers: CANARY });
  console.log(`invoked by gRPC: ${found.status} ${await found.text()}, of nothing: ${missing.status}`);
}

/** Changes much while requests go on. */
async function change(shop: Shop): Promise<void> {
  let goesOn = true;
  const ask = async () => {
    const statuses: number[] = [];
    while (goesOn) statuses.push(await shop.get().then(({ status }) => status, () => 0));
    return statuses;
  };
  const asking = ask();
  await shop.declare({ a: 1, b: 1, c: 1 }, { upstreamId: shop.canaryId, percent: 100 });
  console.log(`all is split: 9 requests: ${await shop.tally(9)}`);
  await shop.declare({ a: 1, b: 1 }, { upstreamId: shop.canaryId, header: { name: "x-canary" } });
  goesOn = false;
  const statuses = await asking;
  const failed = statuses.filter((status) => status !== 200).length;
  console.log(`nothing is, and c leaves: 10 requests: ${await shop.tally(10)}`);
  console.log(`others went on meanwhile: ${statuses.length > 0}, failed: ${failed}`);
}

async function lose(shop: Shop): Promise<void> {
  shop.server("b").stop();
  console.log(`b stops: 9 requests: ${await shop.tally(9)}`);
  const { retries, errors } = await stats(shop, ({ retries }) => retries > 0n);
  console.log(`counted: retries: ${retries > 0n}, errors: ${errors}`);
}

async function drain(shop: Shop, watching: Watching): Promise<void> {
  const asking = shop.get("/held", CANARY);
  await shop.server("d").held;
  console.log(`drained with a request under way: ${state(await shop.operator.drain(shop.id))}`);
  console.log(`the app sees it: ${await seen(watching, UpstreamState.DRAINING)}`);
  const code = await shop.get().then(() => "", (error: NodeJS.ErrnoException) => error.code);
  console.log(`it dials anew: refused: ${code === "ECONNREFUSED"}`);
  console.log(`it invokes by gRPC: ${told(await refused(shop.app.invoke(shop.id)))}`);
  shop.server("d").release();
  const { status, text } = await asking;
  console.log(`the request under way is answered: ${status} ${text}`);
  const drained = await shop.operator.drain(shop.id, { waitMs: WAIT_MS });
  console.log(`connections left: ${drained.status?.activeConnections}`);
}

async function remove(shop: Shop, watching: Watching): Promise<void> {
  const { id, canaryId, operator } = shop;
  console.log(`removed what it splits to: ${told(await refused(operator.remove(canaryId)))}`);
  const removed = await operator.remove(id, { drainMs: 0 });
  console.log(`removed it: ${removed}, again: ${await operator.remove(id)}`);
  console.log(`the app sees it: ${await gone(watching, id)}`);
  console.log(`removed the other: ${await operator.remove(canaryId, { drainMs: 0 })}`);
}

/** Waits until the app has been told that it is so. */
async function seen(watching: Watching, wanted: UpstreamState): Promise<string> {
  for (;;) {
    const { value, done } = await watching.next();
    if (done) throw new Error("the watch ended");
    if (value.case === "upstream" && value.value.status?.state === wanted) return state(value.value);
  }
}

async function gone(watching: Watching, upstreamId: string): Promise<string> {
  for (;;) {
    const { value, done } = await watching.next();
    if (done) throw new Error("the watch ended");
    if (value.case === "removedUpstreamId" && value.value === upstreamId) return "gone";
  }
}

async function refused(call: Promise<unknown>): Promise<RetinueError> {
  return call.then(() => Promise.reject(new Error("it was not refused")), RetinueError.from);
}

function told(refusal: RetinueError): string {
  return `${refusal.codeName} ${refusal.reason}`;
}

function state({ status }: Upstream): string {
  return UpstreamState[status!.state];
}

function shares(counts: Record<string, number | bigint>): string {
  return Object.entries(counts).map(([name, count]) => `${name} ${count}`).sort().join(", ");
}

await main(process.argv[2] ?? "transcript");
