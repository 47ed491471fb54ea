import type { MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { Outgoing } from "./outgoing.js";
import type {
  QueryRequest,
  QueryResponseSchema,
  QueryStreamRequest,
  QueryStreamResponseSchema,
} from "../retinue/scattergather/v1/leaf_service_pb.js";

/** What a leaf knows of a query beside the question. */
export interface LeafContext {
  /** Is aborted when nobody waits for the answer any more. */
  readonly signal: AbortSignal;
  /** How long somebody waits for the answer, from now; undefined = until `signal` says so. */
  readonly remainingMs: number | undefined;
  /** What the root sent along: of the caller's metadata as much as the pool lets through. */
  readonly metadata: Headers;
}

/**
 * Answers one query.
 *
 * It should end soon after its signal is aborted. A coverage in the response says that it stands for a part. A ConnectError keeps
 * its code: InvalidArgument, Unauthenticated and PermissionDenied end the whole request, ResourceExhausted spares this replica;
 * after Unavailable another one may be asked. What else is thrown is Internal, and another one may be asked, too.
 */
export type LeafAnswer = (
  query: QueryRequest,
  context: LeafContext,
) => Promise<MessageInitShape<typeof QueryResponseSchema>>;

const LONGEST_TIMER_MS = 2 ** 31 - 1;

export function failed(error: unknown): ConnectError {
  return ConnectError.from(error, Code.Internal);
}

export function stops(): ConnectError {
  return new ConnectError("cannot answer: the leaf is stopping", Code.Unavailable);
}

/** A query whose answer somebody waits for. */
class Open implements LeafContext {
  readonly #controller = new AbortController();
  readonly #timer: NodeJS.Timeout | undefined;
  readonly #end: number | undefined;

  /** `timeoutMs` of 0 = until its root says so. */
  constructor(
    timeoutMs: number,
    readonly metadata: Headers,
  ) {
    if (timeoutMs) this.#end = performance.now() + timeoutMs;
    const late = () => this.#controller.abort(new ConnectError("the time of the query is over", Code.DeadlineExceeded));
    if (timeoutMs) this.#timer = setTimeout(late, Math.min(timeoutMs, LONGEST_TIMER_MS));
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  get remainingMs(): number | undefined {
    return this.#end && Math.max(this.#end - performance.now(), 0);
  }

  cancel(): void {
    this.close();
    this.#controller.abort(new ConnectError("nobody waits for the answer", Code.Canceled));
  }

  close(): void {
    clearTimeout(this.#timer);
  }
}

/** The queries of one stream. */
export class Queries {
  /** What to send; it ends when everything has been said. */
  readonly responses = new Outgoing<MessageInitShape<typeof QueryStreamResponseSchema>>();
  readonly #answer: LeafAnswer;
  readonly #metadata: Headers;
  readonly #open = new Map<bigint, Open>();
  readonly #running = new Set<Promise<void>>();
  #isFinished = false;

  constructor(answer: LeafAnswer, metadata: Headers) {
    this.#answer = answer;
    this.#metadata = metadata;
  }

  /** Takes queries until the root closes the stream. */
  async receive(requests: AsyncIterable<QueryStreamRequest>): Promise<void> {
    for await (const { queryId, query, timeoutMicros, cancel } of requests) {
      if (cancel) this.#cancel(queryId);
      else if (query && this.#isFinished) this.#refuse(queryId, stops());
      else if (query) this.#begin(queryId, query, Number(timeoutMicros) / 1000);
    }
  }

  /** Takes no more queries, and ends when those under way have. */
  async finish(): Promise<void> {
    this.#isFinished = true;
    await Promise.all(this.#running);
    this.responses.close();
  }

  /** The stream broke: nobody waits for anything. */
  cancel(): void {
    for (const queryId of [...this.#open.keys()]) this.#cancel(queryId);
  }

  #cancel(queryId: bigint): void {
    this.#open.get(queryId)?.cancel();
    this.#open.delete(queryId);
  }

  #begin(queryId: bigint, query: QueryRequest, timeoutMs: number): void {
    const open = new Open(timeoutMs, this.#metadata);
    this.#open.set(queryId, open);
    const running = this.#run(queryId, query, open).finally(() => this.#running.delete(running));
    this.#running.add(running);
  }

  async #run(queryId: bigint, query: QueryRequest, open: Open): Promise<void> {
    try {
      const response = await this.#answer(query, open);
      if (this.#end(queryId)) this.responses.push({ queryId, response });
    } catch (error) {
      if (this.#end(queryId)) this.#refuse(queryId, failed(error));
    }
  }

  /** Whether somebody has waited for it until now. */
  #end(queryId: bigint): boolean {
    this.#open.get(queryId)?.close();
    return this.#open.delete(queryId);
  }

  #refuse(queryId: bigint, { code, rawMessage: message }: ConnectError): void {
    this.responses.push({ queryId, code, message });
  }
}
