import { toJson, type JsonValue, type MessageInitShape } from "@bufbuild/protobuf";
import { ValueSchema } from "@bufbuild/protobuf/wkt";
import type { CallOptions, Client } from "@connectrpc/connect";
import { RetinueError } from "./errors.js";
import type { Coverage, ShardOutcome } from "../retinue/scattergather/v1/coverage_pb.js";
import type {
  CollectedReply,
  ScatterGatherService,
  ScatterPolicySchema,
  ScatterRequestSchema,
  ScatterResponse,
  ScatterStreamResponse,
} from "../retinue/scattergather/v1/scattergather_service_pb.js";

export interface PoolOptions {
  /** The root. */
  client: Client<typeof ScatterGatherService>;
  /** The pool's name. */
  poolId: string;
}

/** What to ask whom. `payload`, `json` and `inputs` exclude each other. */
export interface Question {
  /** What each leaf gets. */
  payload?: Uint8Array;
  /** A value whose text each leaf gets instead. */
  json?: JsonValue;
  /** Shards get inputs of their own instead, by name: bytes, or the text of a value. They select the shards, if nothing else does. */
  inputs?: Record<string, Uint8Array | JsonValue>;
  /** Selects shards by name. Excludes `keys`; both empty = all shards. */
  shards?: string[];
  /** Selects the shards to which these keys belong. */
  keys?: string[];
  /** What is good enough an answer, which then may be partial; by default only all shards are. */
  policy?: MessageInitShape<typeof ScatterPolicySchema>;
}

/** What the pool's merge made of the replies. */
export class Answer {
  constructor(
    /** All that came. */
    readonly response: ScatterResponse,
  ) {}

  /** Whether every selected shard answered, and each of them completely: what to look at before it is trusted. */
  get complete(): boolean {
    return this.response.coverage?.complete ?? false;
  }

  /** How much of the pool it stands for, in leaves. */
  get coverage(): Coverage | undefined {
    return this.response.coverage;
  }

  /** Shards that are missing, or answered in part: at most 16. */
  get failures(): ShardOutcome[] {
    return this.response.failures;
  }

  /** Of the merges concat, first and service; undefined of others. */
  get payload(): Uint8Array | undefined {
    const { output } = this.response;
    return output.case === "payload" ? output.value : undefined;
  }

  /** Of the merges that give JSON; undefined of others. */
  get json(): JsonValue | undefined {
    const { output } = this.response;
    return output.case === "json" ? toJson(ValueSchema, output.value) : undefined;
  }

  /** Of the merge collect, in the pool's order of shards; empty of others. */
  get replies(): CollectedReply[] {
    const { output } = this.response;
    return output.case === "collected" ? output.value.replies : [];
  }
}

/** A pool of leaves, for those who ask it. */
export class Pool {
  readonly #options: PoolOptions;

  constructor(options: PoolOptions) {
    this.#options = options;
  }

  /**
   * Asks the pool. Throws RetinueError: its `missing` tells of the shards that are missing. `timeoutMs` counts, if it is sooner
   * than the pool's deadline; an abort cancels the leaves.
   */
  async scatter(question: Question, options?: CallOptions): Promise<Answer> {
    try {
      return new Answer(await this.#options.client.scatter(this.#request(question), options));
    } catch (error) {
      throw RetinueError.from(error);
    }
  }

  /**
   * Asks the pool and tells of each shard, when it is known what became of it, and at last of the answer. Throws as `scatter`
   * does. Who leaves the loop cancels the rest.
   */
  async *stream(question: Question, options?: CallOptions): AsyncGenerator<ScatterStreamResponse["event"]> {
    const call = new AbortController(); // a client's stream goes on when its loop is left
    const abort = () => call.abort(options?.signal?.reason);
    options?.signal?.addEventListener("abort", abort);
    if (options?.signal?.aborted) abort();
    try {
      const request = this.#request(question);
      const stream = this.#options.client.scatterStream({ request }, { ...options, signal: call.signal });
      for await (const { event } of stream) yield event;
    } catch (error) {
      throw RetinueError.from(error);
    } finally {
      options?.signal?.removeEventListener("abort", abort);
      abort();
    }
  }

  #request(question: Question): MessageInitShape<typeof ScatterRequestSchema> {
    const { poolId } = this.#options;
    const { keys: routeKeys, shards: shardIds, policy } = question;
    return { poolId, routeKeys, shardIds, policy, input: input(question) };
  }
}

function input({ payload, json, inputs }: Question): MessageInitShape<typeof ScatterRequestSchema>["input"] {
  if (inputs) {
    const each = Object.entries(inputs).map(([shardId, content]) => ({
      shardId,
      input: { case: "payload" as const, value: encode(content) },
    }));
    return { case: "shardInputs", value: { inputs: each } };
  }
  return { case: "payload", value: json === undefined ? (payload ?? new Uint8Array()) : encode(json) };
}

function encode(content: Uint8Array | JsonValue): Uint8Array {
  return content instanceof Uint8Array ? content : new TextEncoder().encode(JSON.stringify(content));
}
