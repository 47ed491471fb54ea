//go:build tools

// Package bench pins the servers that are built from their modules.
package bench

import _ "github.com/contribsys/faktory/cmd/faktory"
