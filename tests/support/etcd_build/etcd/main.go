// Command etcd is the server of etcd, as its module gives it: the tests build it where no package is new enough.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
