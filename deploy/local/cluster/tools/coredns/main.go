// CoreDNS with the six plugins that a cluster on one machine needs: no cloud SDKs to fetch and compile.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"
)

// The order in which plugins see a query.
func init() {
	dnsserver.Directives = []string{"bind", "ready", "log", "errors", "template", "kubernetes"}
}

func main() {
	coremain.Run()
}
