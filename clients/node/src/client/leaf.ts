import { once } from "node:events";
import * as http2 from "node:http2";
import type { AddressInfo } from "node:net";
import type { MessageInitShape } from "@bufbuild/protobuf";
import type { ConnectRouter, HandlerContext } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { socketPath } from "./connection.js";
import { failed, Queries, stops, type LeafAnswer, type LeafContext } from "./queries.js";
import {
  LeafService,
  type QueryStreamRequest,
  type QueryStreamResponseSchema,
} from "../retinue/scattergather/v1/leaf_service_pb.js";

export interface LeafOptions {
  /** Answers one query; many at once. */
  answer: LeafAnswer;
  /** How long queries may go on after `stop`, in milliseconds, by default 5 s. */
  graceMs?: number;
  /** The certificate and key to show to roots; by default it is plaintext. */
  tls?: http2.SecureServerOptions;
  /** Adds what else the server serves, such as a MergeService. */
  routes?: (router: ConnectRouter) => void;
}

/** Answers what roots ask, by calls and over streams. */
export class Leaf {
  readonly #options: LeafOptions;
  readonly #server: http2.Http2Server;
  readonly #sessions = new Set<http2.Http2Session>();
  readonly #stopping = new AbortController();
  #stopped: Promise<void> | undefined;

  constructor(options: LeafOptions) {
    this.#options = options;
    const { routes, tls } = options;
    const answer = connectNodeAdapter({ routes: (router) => (this.routes(router), routes?.(router)) });
    const handle = (request: http2.Http2ServerRequest, response: http2.Http2ServerResponse) => {
      request.headers[":authority"] = "localhost"; // the adapter throws for what is no host, as some say on a socket
      answer(request, response);
    };
    this.#server = tls ? http2.createSecureServer(tls, handle) : http2.createServer(handle);
    this.#server.on("session", (session) => this.#keep(session));
  }

  /** Serves at HOST:PORT, unix:PATH or the absolute path of a socket; gives the address, where port 0 is a free one. */
  async listen(address: string): Promise<string> {
    const path = socketPath(address);
    const [host, port] = hostAndPort(address);
    this.#server.listen(path === undefined ? { host, port } : { path });
    await once(this.#server, "listening");
    if (path !== undefined) return `unix:${path}`;
    return address.replace(/\d+$/, String((this.#server.address() as AddressInfo).port));
  }

  /** Takes no more queries, and ends when those under way have: after the grace they are cut. Safe to repeat. */
  stop(): Promise<void> {
    return (this.#stopped ??= this.#stop());
  }

  async #stop(): Promise<void> {
    const closed = once(this.#server, "close");
    this.#server.close();
    this.#stopping.abort();
    for (const session of this.#sessions) session.close();
    const late = setTimeout(() => this.#cut(), this.#options.graceMs ?? 5_000);
    await closed;
    clearTimeout(late);
  }

  /** For a server that others make: connectNodeAdapter({ routes: leaf.routes }). It is not to be stopped then. */
  readonly routes = (router: ConnectRouter): void => {
    router.service(LeafService, {
      query: async (query, context) => {
        try {
          return await this.#options.answer(query, new Called(context));
        } catch (error) {
          throw failed(error);
        }
      },
      queryStream: (requests, context) => this.#answers(requests, context),
    });
  };

  async *#answers(
    requests: AsyncIterable<QueryStreamRequest>,
    { signal, requestHeader }: HandlerContext,
  ): AsyncGenerator<MessageInitShape<typeof QueryStreamResponseSchema>> {
    const queries = new Queries(this.#options.answer, requestHeader);
    const finish = () => void queries.finish();
    const cancel = () => queries.cancel();
    signal.addEventListener("abort", cancel);
    this.#stopping.signal.addEventListener("abort", finish);
    void queries.receive(requests).catch(cancel).finally(finish);
    yield* queries.responses;
    signal.removeEventListener("abort", cancel);
    this.#stopping.signal.removeEventListener("abort", finish);
    if (this.#stopping.signal.aborted) throw stops();
  }

  #keep(session: http2.Http2Session): void {
    this.#sessions.add(session);
    session.on("close", () => this.#sessions.delete(session));
  }

  #cut(): void {
    for (const session of this.#sessions) session.destroy();
  }
}

/** The context of a query that is a call of its own. */
class Called implements LeafContext {
  readonly signal: AbortSignal;
  readonly metadata: Headers;
  readonly #context: HandlerContext;

  constructor(context: HandlerContext) {
    this.#context = context;
    this.signal = context.signal;
    this.metadata = context.requestHeader;
  }

  get remainingMs(): number | undefined {
    const left = this.#context.timeoutMs();
    return left && Math.max(left, 0);
  }
}

function hostAndPort(address: string): [string, number] {
  const colon = address.lastIndexOf(":");
  return [address.slice(0, colon).replace(/^\[(.*)\]$/, "$1"), Number(address.slice(colon + 1))];
}
