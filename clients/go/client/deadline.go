package client

import (
	"math"
	"sync"
	"time"
)

// deadline tells until when a leadership is valid, by the app's own boot clock: each message is stamped before it is sent,
// and what the server grants counts from the stamp of the message it answers. A late answer grants less, never more.
// Sequences count the messages of one stream: 0 is `start`, then come the heartbeats.
type deadline struct {
	now func() time.Duration // since the machine started

	mu       sync.Mutex
	at       time.Duration
	sequence int64
	stamps   map[int64]time.Duration
}

const never = time.Duration(math.MinInt64)

func newDeadline(now func() time.Duration) *deadline {
	return &deadline{now: now, at: never, stamps: map[int64]time.Duration{}}
}

// start notes that the first message of a stream is about to be sent. Answers of earlier streams can't be told any more.
func (d *deadline) start() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sequence, d.stamps = 0, map[int64]time.Duration{0: d.now()}
}

// beat gives the sequence of the heartbeat that is about to be sent.
func (d *deadline) beat() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sequence++
	d.stamps[d.sequence] = d.now()
	return d.sequence
}

// grant is the server's answer to a message. It never moves the deadline back; one to no message that was sent grants
// nothing.
func (d *deadline) grant(sequence int64, valid time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	stamp, sent := d.stamps[sequence]
	if !sent {
		return
	}
	d.at = max(d.at, stamp+valid)
	for known := range d.stamps {
		if known < sequence {
			delete(d.stamps, known)
		}
	}
}

// reset begins another term: what was granted for the last one does not count for it.
func (d *deadline) reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.at = never
}

// remaining is what is left; 0 = it is over.
func (d *deadline) remaining() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	if d.at <= now {
		return 0
	}
	return d.at - now
}
