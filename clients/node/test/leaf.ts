// A leaf, asked as roots ask it: it needs no server.
import assert from "node:assert/strict";
import { once } from "node:events";
import { mkdtempSync } from "node:fs";
import * as http2 from "node:http2";
import * as net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import type { MessageInitShape } from "@bufbuild/protobuf";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { Code, ConnectError, createClient, Leaf, type Client, type LeafAnswer } from "retinue/client";
import {
  LeafService,
  type QueryStreamRequestSchema,
  type QueryStreamResponse,
} from "retinue/scattergather/v1/leaf_service_pb";
import { Outgoing } from "../src/client/outgoing.js";

type Said = MessageInitShape<typeof QueryStreamRequestSchema>;

const encode = (text: string) => new TextEncoder().encode(text);
const decode = (data: Uint8Array | undefined) => new TextDecoder().decode(data);

/** Events that a test waits for, in their order. */
class Heard<T> {
  readonly #outgoing = new Outgoing<{ event: T }>();
  readonly #events = this.#outgoing[Symbol.asyncIterator]();

  readonly tell = (event: T): void => this.#outgoing.push({ event });

  async next(): Promise<T> {
    return (await this.#events.next()).value?.event ?? assert.fail("nothing more comes");
  }
}

/** A leaf that is served, and a root's way to it. What it does to a query, the query's payload says. */
class Grown {
  readonly begun = new Heard<string>();
  readonly causes = new Heard<ConnectError>();
  readonly leaf: Leaf;
  readonly #talks: Talk[] = [];
  root!: Client<typeof LeafService>;
  release = () => {};

  constructor() {
    this.leaf = new Leaf({ answer: this.#answer, graceMs: 20_000 });
  }

  readonly #answer: LeafAnswer = async ({ shardId, payload }, { signal, remainingMs }) => {
    const asked = decode(payload);
    if (asked === "refuse") throw new ConnectError("not for you", Code.PermissionDenied);
    if (asked === "break") throw new Error("broken");
    if (asked === "time") return { payload: encode(String(remainingMs)) };
    if (asked === "wait") await this.#wait(shardId, signal);
    return { payload: encode(`${shardId} says ${asked}`), coverage: { expected: 2n, answered: 1n } };
  };

  async #wait(shardId: string, signal: AbortSignal): Promise<void> {
    const released = new Promise<void>((resolve) => (this.release = resolve));
    this.begun.tell(shardId);
    await Promise.race([released, once(signal, "abort")]);
    if (!signal.aborted) return;
    this.causes.tell(ConnectError.from(signal.reason));
    throw signal.reason;
  }

  async serve(): Promise<void> {
    const baseUrl = `http://${await this.leaf.listen("127.0.0.1:0")}`;
    this.root = createClient(LeafService, createGrpcTransport({ baseUrl }));
  }

  /** Opens a stream of queries. */
  talk(): Talk {
    const talk = new Talk(this.root);
    this.#talks.push(talk);
    return talk;
  }

  async close(): Promise<void> {
    for (const talk of this.#talks) talk.cut();
    await this.leaf.stop();
  }
}

class Talk {
  readonly #said = new Outgoing<Said>();
  readonly #breaker = new AbortController();
  readonly #answers: AsyncIterator<QueryStreamResponse>;

  constructor(root: Client<typeof LeafService>) {
    const answers = root.queryStream(this.#said as AsyncIterable<Said>, { signal: this.#breaker.signal });
    this.#answers = answers[Symbol.asyncIterator]();
  }

  say(request: Said): void {
    this.#said.push(request);
  }

  ask(queryId: bigint, payload: string, timeoutMicros = 0n): void {
    this.say({ queryId, query: { shardId: "s1", payload: encode(payload) }, timeoutMicros });
  }

  async next(): Promise<QueryStreamResponse> {
    return (await this.#answers.next()).value ?? assert.fail("the stream has ended");
  }

  /** Says that no more comes, and gives what is heard until the end. */
  async rest(): Promise<QueryStreamResponse[]> {
    this.#said.close();
    const heard = [];
    for (let next = await this.#answers.next(); !next.done; next = await this.#answers.next()) heard.push(next.value);
    return heard;
  }

  cut(): void {
    this.#answers.next().catch(() => {});
    this.#breaker.abort();
  }
}

async function refused(call: Promise<unknown>): Promise<ConnectError> {
  return ConnectError.from(await call.then(() => assert.fail("it was not refused"), (error: unknown) => error));
}

function claim(name: string, body: (grown: Grown) => Promise<void>): void {
  test(name, { timeout: 120_000 }, async () => {
    const grown = new Grown();
    await grown.serve();
    try {
      await body(grown);
    } finally {
      await grown.close();
    }
  });
}

claim("a leaf answers a call with what its function gives", async ({ root }) => {
  const { payload, coverage } = await root.query({ shardId: "s1", payload: encode("hello") });
  assert.equal(decode(payload), "s1 says hello");
  assert.equal(coverage?.answered, 1n);
});

claim("a leaf answers the queries of a stream as they are ready", async (grown) => {
  const said = grown.talk();
  said.ask(1n, "wait");
  said.ask(2n, "hello", 20_000_000n);
  await grown.begun.next();
  const first = await said.next();
  assert.equal(first.queryId, 2n);
  assert.equal(decode(first.response?.payload), "s1 says hello");
  assert.equal(first.response?.coverage?.answered, 1n);
  grown.release();
  assert.equal((await said.next()).queryId, 1n);
});

claim("an error keeps its code by a call and on a stream", async (grown) => {
  const said = grown.talk();
  for (const [payload, code] of [["refuse", Code.PermissionDenied] as const, ["break", Code.Internal] as const]) {
    const error = await refused(grown.root.query({ payload: encode(payload) }));
    said.ask(BigInt(code), payload);
    const answer = await said.next();
    assert.deepEqual([error.code, answer.code], [code, code]);
    assert.equal(answer.message, error.rawMessage);
    assert.equal(answer.response, undefined);
  }
});

claim("a cancelled query is stopped and nothing is said of it", async (grown) => {
  const said = grown.talk();
  said.ask(1n, "wait");
  await grown.begun.next();
  said.say({ queryId: 1n, cancel: true });
  assert.equal((await grown.causes.next()).code, Code.Canceled);
  said.say({ queryId: 7n, cancel: true }); // nobody's: a late one
  said.ask(2n, "hello");
  assert.deepEqual((await said.rest()).map(({ queryId }) => queryId), [2n]);
});

claim("a query has what is left of its root's time", async (grown) => {
  const said = grown.talk();
  const byCall = await grown.root.query({ payload: encode("time") }, { timeoutMs: 20_000 });
  said.ask(1n, "time", 20_000_000n);
  said.ask(2n, "time");
  for (const { payload } of [byCall, (await said.next()).response!]) {
    const left = Number(decode(payload));
    assert.ok(left > 0 && left <= 20_000, String(left));
  }
  assert.equal(decode((await said.next()).response?.payload), "undefined");
});

claim("a query whose time is over is stopped", async (grown) => {
  const said = grown.talk();
  said.ask(1n, "wait", 10_000n);
  assert.equal((await grown.causes.next()).code, Code.DeadlineExceeded);
  assert.equal((await said.next()).code, Code.DeadlineExceeded);
  const error = await refused(grown.root.query({ payload: encode("wait") }, { timeoutMs: 100 }));
  assert.equal(error.code, Code.DeadlineExceeded);
});

claim("a broken stream stops its queries", async (grown) => {
  const said = grown.talk();
  said.ask(1n, "wait");
  said.ask(2n, "wait");
  await grown.begun.next();
  await grown.begun.next();
  said.cut();
  assert.equal((await grown.causes.next()).code, Code.Canceled);
  assert.equal((await grown.causes.next()).code, Code.Canceled);
});

claim("a leaf that stops answers what it has begun", async (grown) => {
  const said = grown.talk();
  said.ask(1n, "wait");
  await grown.begun.next();
  const stopped = grown.leaf.stop();
  said.ask(2n, "hello");
  assert.equal((await said.next()).code, Code.Unavailable);
  grown.release();
  assert.equal((await said.next()).queryId, 1n);
  assert.equal((await refused(said.rest())).code, Code.Unavailable);
  await stopped;
  await grown.leaf.stop();
});

claim("a leaf that was never served can be stopped", async () => {
  await new Leaf({ answer: async () => ({}) }).stop();
});

claim("a leaf cuts what goes on after its grace", async () => {
  const begun = new Heard<string>();
  const answer: LeafAnswer = async ({ shardId }, { signal }) => (begun.tell(shardId), await once(signal, "abort"), {});
  const leaf = new Leaf({ answer, graceMs: 50 });
  const baseUrl = `http://${await leaf.listen("127.0.0.1:0")}`;
  const call = refused(createClient(LeafService, createGrpcTransport({ baseUrl })).query({ shardId: "s1" }));
  await begun.next();
  await leaf.stop();
  await call;
});

claim("a leaf listens on a socket, too", async () => {
  const path = join(mkdtempSync(join(tmpdir(), "leaf-")), "leaf.sock");
  const leaf = new Leaf({ answer: async ({ payload }) => ({ payload }) });
  assert.equal(await leaf.listen(`unix:${path}`), `unix:${path}`);
  const transport = createGrpcTransport({
    baseUrl: "http://localhost",
    nodeOptions: { createConnection: () => net.connect(path) },
  });
  const { payload } = await createClient(LeafService, transport).query({ payload: encode("hello") });
  assert.equal(decode(payload), "hello");
  assert.equal(await statusOfACall(path, "tmp%2Fleaf.sock"), "0");
  await leaf.stop();
});

/** Calls as gRPC's C core does, which says the socket's path where a host should be. */
async function statusOfACall(path: string, authority: string): Promise<unknown> {
  const session = http2.connect("http://localhost", { createConnection: () => net.connect(path) });
  const call = session.request({
    ":method": "POST",
    ":authority": authority,
    ":path": `/${LeafService.typeName}/Query`,
    "content-type": "application/grpc",
    te: "trailers",
  });
  call.end(Uint8Array.of(0, 0, 0, 0, 0)).resume();
  const [trailers] = await once(call, "trailers");
  session.close();
  return trailers["grpc-status"];
}
