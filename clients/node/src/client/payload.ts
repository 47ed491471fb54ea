import { fromJson, toJson, type JsonValue, type MessageInitShape } from "@bufbuild/protobuf";
import { ValueSchema } from "@bufbuild/protobuf/wkt";
import type { Payload, PayloadSchema } from "../retinue/workqueue/v1/task_pb.js";

type Init = MessageInitShape<typeof PayloadSchema>;

/** A payload of text. */
export function text(value: string): Init {
  return { content: { case: "text", value } };
}

/** A payload of bytes. */
export function bytes(value: Uint8Array): Init {
  return { content: { case: "data", value } };
}

/** A payload of a JSON value. */
export function json(value: JsonValue): Init {
  return { content: { case: "json", value: fromJson(ValueSchema, value) } };
}

/** The JSON value of a payload; undefined if it has another content. */
export function jsonOf(payload: Payload | undefined): JsonValue | undefined {
  return payload?.content.case === "json" ? toJson(ValueSchema, payload.content.value) : undefined;
}
