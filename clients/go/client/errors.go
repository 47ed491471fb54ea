package client

import (
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	scattergatherv1 "retinue/scattergather/v1"
	workqueuev1 "retinue/workqueue/v1"
)

// Error is what a server answered, or how one item of a batch went.
type Error struct {
	// Code is the canonical code.
	Code codes.Code
	// Reason is a retinue.error.v1.ErrorReason without its prefix, such as LEASE_LOST; empty if the error is not Retinue's.
	Reason string
	// Message is for people.
	Message string
	// Metadata belongs to the reason.
	Metadata map[string]string
	// Fields are the paths of the fields that are wrong, with what would be right, after INVALID_ARGUMENT.
	Fields []Field
	// RetryAfter is when trying again is worth it; 0 = the server did not say that it is.
	RetryAfter time.Duration
	// Missing tells how much had answered, and which shards are missing, of a scatter that failed although leaves were asked;
	// nil of others.
	Missing *scattergatherv1.ScatterFailure
}

// Field is one field that is wrong.
type Field struct{ Path, Description string }

// CodeName is the code as the contract spells it: NOT_FOUND.
func (e *Error) CodeName() string { return code.Code(e.Code).String() }

func (e *Error) Error() string {
	return fmt.Sprintf("%s %s: %s", e.CodeName(), e.Reason, e.Message)
}

// FromError reads an error of a call; nil for nil.
func FromError(err error) *Error {
	if err == nil {
		return nil
	}
	var known *Error
	if errors.As(err, &known) {
		return known
	}
	from := status.Convert(err)
	result := &Error{Code: from.Code(), Message: from.Message()}
	for _, detail := range from.Details() {
		result.add(detail)
	}
	return result
}

func (e *Error) add(detail any) {
	switch detail := detail.(type) {
	case *errdetails.ErrorInfo:
		e.Reason, e.Metadata = detail.Reason, detail.Metadata
	case *errdetails.RetryInfo:
		e.RetryAfter = detail.RetryDelay.AsDuration()
	case *scattergatherv1.ScatterFailure:
		e.Missing = detail
	case *errdetails.BadRequest:
		for _, violation := range detail.FieldViolations {
			e.Fields = append(e.Fields, Field{violation.Field, violation.Description})
		}
	}
}

// FromItem reads how one item of a batch went; nil if it went well.
func FromItem(item *workqueuev1.ItemStatus) *Error {
	if item.GetCode() == 0 {
		return nil
	}
	return &Error{Code: codes.Code(item.Code), Reason: item.Reason, Message: item.Message}
}

// permanent tells whether the same call fails until somebody changes something.
func (e *Error) permanent() bool {
	switch e.Code {
	case codes.InvalidArgument, codes.Unauthenticated, codes.PermissionDenied, codes.Unimplemented, codes.NotFound:
		return true
	default:
		return false
	}
}

// passing tells whether the same item may be taken soon without anybody doing anything. A cut connection and a message that
// can't be sent look alike; the latter does not pass, and so a few tries must do.
func (e *Error) passing(tries int) bool {
	switch e.Code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Aborted:
		return true
	case codes.Unknown, codes.Internal:
		return tries < 5
	default:
		return e.Reason == "DISK_FULL" || e.Reason == "CONCURRENCY_LIMIT"
	}
}

// leaseOver tells whether the lease ended, so that nothing more can be said of it.
func (e *Error) leaseOver() bool {
	return e.Reason == "LEASE_LOST" || e.Reason == "ALREADY_FINALIZED"
}

// hopeful tells whether a stream that ended so is worth opening again: it broke, or the server says when to come back.
func hopeful(err error) bool {
	if errors.Is(err, io.EOF) {
		return true
	}
	from := FromError(err)
	return from.Code == codes.Unavailable || from.RetryAfter > 0
}
