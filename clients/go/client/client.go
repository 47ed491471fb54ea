// Package client has what the generated stubs leave to every program: where the server is, how to dial it, what its
// errors say, the loop of a worker, leadership, both sides of a scatter, what stands behind localhost, and watching and
// telling the adapter.
package client

import (
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

// DefaultAddress is where a server with all patterns listens.
const DefaultAddress = "127.0.0.1:7070"

// Address finds the server of one pattern, such as "workqueue": RETINUE_WORKQUEUE_ADDRESS, then RETINUE_ADDRESS, then
// DefaultAddress. It is HOST:PORT, unix:PATH, or the absolute path of a socket.
func Address(pattern string) string {
	for _, name := range []string{"RETINUE_" + strings.ToUpper(pattern) + "_ADDRESS", "RETINUE_ADDRESS"} {
		if address := os.Getenv(name); address != "" {
			return target(address)
		}
	}
	return DefaultAddress
}

func target(address string) string {
	if strings.HasPrefix(address, "/") {
		return "unix:" + address
	}
	return address
}

// Dial opens a connection to the server of one pattern, in plaintext: apps dial localhost, and the relay there holds the
// credentials for what is farther away. A server that restarts is found again within a second. Options come last and win.
func Dial(pattern string, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	longest := time.Second
	if pattern == "leaderelection" {
		longest = 250 * time.Millisecond // a session must be resumed within the app's lease
	}
	quick := grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: longest},
		MinConnectTimeout: 5 * time.Second,
	}
	defaults := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(quick),
		grpc.WithNoProxy(),
	}
	return grpc.NewClient(Address(pattern), append(defaults, options...)...)
}
