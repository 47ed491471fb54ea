package client

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
)

// newProof makes a file in a directory that the server sees, too, with a lock that is held until the file is closed here and
// in every process that inherited it.
func newProof(directory string) (*os.File, error) {
	path := filepath.Join(directory, fmt.Sprintf("%d-%.16s", os.Getpid(), rand.Text()))
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	if err := lock(file); err != nil {
		dropProof(file)
		return nil, err
	}
	return file, nil
}

func dropProof(file *os.File) {
	_ = os.Remove(file.Name()) // one that is left is swept by the server
	_ = file.Close()
}
