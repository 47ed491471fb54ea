package client

import (
	"google.golang.org/protobuf/types/known/structpb"

	workqueuev1 "retinue/workqueue/v1"
)

// Text is a payload of text.
func Text(text string) *workqueuev1.Payload {
	return &workqueuev1.Payload{Content: &workqueuev1.Payload_Text{Text: text}}
}

// Bytes is a payload of bytes.
func Bytes(data []byte) *workqueuev1.Payload {
	return &workqueuev1.Payload{Content: &workqueuev1.Payload_Data{Data: data}}
}

// JSON is a payload of a JSON value, of the types that structpb.NewValue takes; an error for any other.
func JSON(value any) (*workqueuev1.Payload, error) {
	json, err := structpb.NewValue(value)
	return &workqueuev1.Payload{Content: &workqueuev1.Payload_Json{Json: json}}, err
}
