package client

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// bootTime is the time since the machine started. It counts suspended time and is never stepped.
func bootTime() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		panic(err) // every Linux that Go runs on has it
	}
	return time.Duration(now.Nano())
}

// lock takes the exclusive lock that the kernel frees when every process that has the file is gone.
func lock(file *os.File) error {
	return unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
}
