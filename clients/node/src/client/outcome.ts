import type { MessageInitShape } from "@bufbuild/protobuf";
import type { Client } from "@connectrpc/connect";
import { RetinueError } from "./errors.js";
import type { PayloadSchema, TaskSpecSchema } from "../retinue/workqueue/v1/task_pb.js";
import type {
  CompletionSchema,
  ReleaseSchema,
  StreamTasksRequestSchema,
  TaskFailureSchema,
  WorkQueueService,
} from "../retinue/workqueue/v1/workqueue_service_pb.js";

/** What a handler gives back: committed with its follow-ups, or not at all. */
export interface Result {
  payload?: MessageInitShape<typeof PayloadSchema>;
  followUps?: MessageInitShape<typeof TaskSpecSchema>[];
}

/** Says more of a failure than its text: a word for programs, and whether no other attempt can help. */
export class Failure extends Error {
  override readonly name = "Failure";

  constructor(
    readonly reason: string,
    message: string,
    readonly final: boolean = false,
  ) {
    super(message);
  }
}

/** How a lease ends: one of the three. */
export type Outcome =
  | { completion: MessageInitShape<typeof CompletionSchema> }
  | { failure: MessageInitShape<typeof TaskFailureSchema> }
  | { release: MessageInitShape<typeof ReleaseSchema> };

export function completion(leaseToken: Uint8Array, result: Result | undefined): Outcome {
  return { completion: { leaseToken, result: result?.payload, followUps: result?.followUps } };
}

export function failure(leaseToken: Uint8Array, error: unknown): Outcome {
  const { reason, message, final } =
    error instanceof Failure ? error : new Failure("ERROR", error instanceof Error ? error.message : String(error));
  return { failure: { leaseToken, failure: { reason: cut(reason, 128), message: cut(message, 4096) }, final } };
}

/** Keeps the first characters (not UTF-16 units), and only what UTF-8 can carry. */
function cut(text: string, limit: number): string {
  return Array.from(text.slice(0, 2 * limit)).slice(0, limit).join("").toWellFormed();
}

/** The outcome as a message of a worker's stream. */
export function onStream(outcome: Outcome): MessageInitShape<typeof StreamTasksRequestSchema> {
  if ("completion" in outcome) return { completions: [outcome.completion] };
  if ("failure" in outcome) return { failures: [outcome.failure] };
  return { releases: [outcome.release] };
}

/** Says the outcome by a call; undefined if it is durable. */
export async function byCall(
  outcome: Outcome,
  client: Client<typeof WorkQueueService>,
  options: { signal: AbortSignal; timeoutMs: number },
): Promise<RetinueError | undefined> {
  try {
    const { results } = await call(outcome, client, options);
    return RetinueError.fromItem(results[0]?.status);
  } catch (error) {
    return RetinueError.from(error);
  }
}

function call(
  outcome: Outcome,
  client: Client<typeof WorkQueueService>,
  options: { signal: AbortSignal; timeoutMs: number },
) {
  if ("completion" in outcome) return client.completeTasks({ completions: [outcome.completion] }, options);
  if ("failure" in outcome) return client.failTasks({ failures: [outcome.failure] }, options);
  return client.releaseTasks({ releases: [outcome.release] }, options);
}
