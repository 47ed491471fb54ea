import type { MessageInitShape } from "@bufbuild/protobuf";
import { Code, ConnectError } from "@connectrpc/connect";
import { Outgoing } from "./outgoing.js";
import type {
  QueryRequest,
  QueryResponseSchema,
  QueryStreamRequest,
  QueryStreamResponseSchema,
} from "../retinue/scattergather/v1/leaf_service_pb.js";

/**
 * Answers one query.
 *
 * It should end soon after its signal is aborted: nobody waits for the answer any more. A coverage in the response says that it
 * stands for a part. A ConnectError keeps its code: InvalidArgument, Unauthenticated and PermissionDenied end the whole request,
 * ResourceExhausted spares this replica; after Unavailable, or anything else that is thrown, another replica may be asked.
 */
export type LeafAnswer = (
  query: QueryRequest,
  signal: AbortSignal,
) => Promise<MessageInitShape<typeof QueryResponseSchema>>;

const LONGEST_TIMER_MS = 2 ** 31 - 1;

export function failed(error: unknown): ConnectError {
  return ConnectError.from(error, Code.Unknown);
}

export function stops(): ConnectError {
  return new ConnectError("cannot answer: the leaf is stopping", Code.Unavailable);
}

/** A query whose answer somebody waits for. */
class Open {
  readonly #controller = new AbortController();
  readonly #timer: NodeJS.Timeout | undefined;

  /** Its time is in milliseconds; 0 = until its root says so. */
  constructor(timeoutMs: number) {
    const late = () => this.#controller.abort(new ConnectError("the time of the query is over", Code.DeadlineExceeded));
    if (timeoutMs) this.#timer = setTimeout(late, Math.min(timeoutMs, LONGEST_TIMER_MS));
  }

  get signal(): AbortSignal {
    return this.#controller.signal;
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
  readonly #open = new Map<bigint, Open>();
  readonly #running = new Set<Promise<void>>();
  #isFinished = false;

  constructor(answer: LeafAnswer) {
    this.#answer = answer;
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
    const open = new Open(timeoutMs);
    this.#open.set(queryId, open);
    const running = this.#run(queryId, query, open).finally(() => this.#running.delete(running));
    this.#running.add(running);
  }

  async #run(queryId: bigint, query: QueryRequest, open: Open): Promise<void> {
    try {
      const response = await this.#answer(query, open.signal);
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
