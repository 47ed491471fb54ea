//go:build !linux

package client

import (
	"errors"
	"os"
	"time"
)

var started = time.Now()

// bootTime is Go's monotonic clock where there is no boot clock: some systems stop it while the machine is suspended, so that
// only the token protects from a leader that wakes up.
func bootTime() time.Duration { return time.Since(started) }

func lock(*os.File) error {
	return errors.New("cannot prove death by a locked file: this is done on Linux alone; leave ProofDir empty")
}
