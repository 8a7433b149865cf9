# `make run` on a fresh Debian 12 or 13 is the place to start. All the work is in tools/.

.DEFAULT_GOAL := help
.PHONY: help setup run test screenshots coverage test-kvm test-user conformance inspect-suite kvm-lab lint check-imports format bench-start bench-agent bench-pods bench-network bench-networks bench-files bench-overhead bench-hypervisors bench-scrape bench-beside bench-performance faults endurance hostile work commands compose fuzz-agent install uninstall prove-bare clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## install what is needed, prepare a guest, run a first container in its own virtual machine
	@tools/setup run
	@tools/first-run

setup: ## the same without running anything
	@tools/setup run

test: ## run the tests; T='tests/vm/test_x.py -k word' runs only those
	@tools/setup test
	@tools/run-tests $(T)

screenshots: ## the pictures of kata-monitor's page in docs/images
	@tools/setup test
	@.venv/bin/python tests/unit/page_pictures.py docs/images

coverage: ## the unit tests, and how much of the source they reach; T='tests/unit/test_x.py'
	@tools/setup test
	@tools/coverage $(T)

test-kvm: ## the tests with KVM and vsock, in the KVM lab where this machine has none; SHORT=1, T='...'
	@tools/setup test
	@tools/run-tests $(if $(SHORT),-m 'not long') $(or $(T),tests/kvm)

test-user: ## the tests of 'kata run' and its kind as an ordinary user; T='...'
	@tools/setup test
	@tools/as-user tools/run-tests -p no:cacheprovider $(or $(T),$(addprefix tests/vm/test_cli_,run.py refusals.py life.py look.py cp.py network.py networks.py))

conformance: ## critest against containerd with runc and with kata, writes docs/conformance.md; A='--fresh --only TEXT'
	@tools/setup test
	@tools/setup conformance
	@tools/conformance $(A)

inspect-suite: ## kata inspect-image over nasty and ordinary images, beside syft; A='--only nasty/ --count 9 --fresh --here'
	@tools/setup test
	@tools/setup conformance
	@tools/conformance --inspect $(A)

kvm-lab: ## run CMD='...' in a machine with working KVM, or a shell; A='--get FILE --timeout 60 ...'
	@tools/kvm-lab $(A) $(if $(CMD),-- bash -c "$$CMD",--shell)

.PHONY: site
site: ## the documents as a site in build/site, built strictly, with all links checked
	@tools/setup site
	@/usr/bin/python3 tools/docs_site.py build/site

lint: ## formatting, types, import direction, clippy
	@tools/setup lint
	@tools/lint

check-imports:
	@/usr/bin/python3 -I tools/check_imports.py

format: ## let ruff and rustfmt rewrite the source
	@tools/setup lint
	@tools/lint --fix

bench-start: ## cold start against a bare boot and against runc; A='--rounds 30 --json'
	@tools/setup test
	@bench/start $(A)

bench-agent: ## footprint, latency and throughput of the agent in a guest; A='--idle 60 --json'
	@tools/setup test
	@bench/agent $(A)

bench-pods: ## thirty pods at once, beside one alone and beside runc; A='--pods 10'
	@tools/setup test
	@bench/pods $(A)

bench-network: ## a pod's network to its host, beside runc's; A='--seconds 10 --rounds 9'
	@tools/setup test
	@bench/network $(A)

bench-networks: ## networks with a name: requests beside runc, 100 containers, set-up beside netavark; A='life --containers 20'
	@tools/setup test
	@bench/networks $(A)

bench-beside: ## this checkout beside another one that is set up; A='CHECKOUT --rounds 9'
	@tools/setup test
	@bench/beside $(A)

bench-performance: ## starts, execs, ends and memory beside runc, podman, bare QEMU and a checkout that is set up; A="[CHECKOUT] --write docs/performance.md"
	@tools/setup test
	@bench/performance $(A)

bench-overhead: ## what a machine takes on the host besides its guest's memory; A='--mib 512'
	@tools/setup test
	@bench/overhead $(A)

bench-hypervisors: ## each hypervisor's start, stop and memory, beside the bare monitor; A='--rounds 9 --hypervisor qemu'
	@tools/setup test
	@bench/hypervisors $(A)

.PHONY: bench-inspect
bench-inspect: ## kata inspect-image beside syft on a Debian image of some 300 MB; A='--rounds 3 --layout DIR'
	@tools/setup test
	@tools/setup conformance
	@bench/inspect-images $(A)

bench-scrape: ## what a scrape of a sandbox costs its host, beside one that is not scraped; A='--sandboxes 5 --seconds 60'
	@tools/setup test
	@bench/scrape $(A)

bench-files: ## file I/O in a pod's root file system and volume, beside runc's; A='--mib 512'
	@tools/setup test
	@bench/files $(A)

faults: ## kill everybody at every point and 200 times at random, write docs/faults.md; A='--resume', A='--containerd 2', A=--podman
	@tools/setup test
	@tools/faults --report docs/faults.md $(A)

endurance: ## 500 runs, 500 execs and 200 containers by podman: statuses, bytes, what has grown; A='--runs 50 --resume'
	@tools/setup test
	@tools/endurance $(A)

hostile: ## hostile archives, registries, agents and command lines; A='--short --seed 7 --only archives'
	@tools/setup test
	@tools/hostile $(A)

work: ## people's real work with Docker, runc beside kata, for docs/clients.md; A=--lab for the column with KVM
	@tools/setup test
	@tools/conformance --work $(A)

commands: ## what users of Docker and Podman type, with both and with kata, for docs/docker-commands.md; A='--only images'
	@tools/setup test
	@tools/conformance --commands $(A)

compose: ## a compose file with docker compose and podman-compose, runc beside kata, for docs/compose.md
	@tools/setup test
	@tools/setup conformance
	@tools/conformance --compose $(A)

fuzz-agent: ## the agent's parsers against malformed input for MINUTES=10; SEED=... repeats a run
	@tools/setup test
	@tools/fuzz-agent $(or $(MINUTES),10) $(SEED)

install: ## kata on this machine's PATH, told to its containerd and Docker; PREFIX, DESTDIR, KERNEL=auto|small|distro, CLIENTS=auto|none, FORCE=1, DRY_RUN=1
	@tools/install $(if $(CLIENTS),--clients '$(CLIENTS)') $(if $(DRY_RUN),--dry-run) $(if $(FORCE),--force) $(if $(PREFIX),--prefix '$(PREFIX)') \
	    $(if $(DESTDIR),--destdir '$(DESTDIR)') $(if $(KERNEL),--kernel '$(KERNEL)')

uninstall: ## take it back; PURGE=1 also removes images and containers, FORCE=1 even while some run
	@tools/uninstall $(if $(CLIENTS),--clients '$(CLIENTS)') $(if $(DRY_RUN),--dry-run) $(if $(FORCE),--force) $(if $(PURGE),--purge) \
	    $(if $(PREFIX),--prefix '$(PREFIX)') $(if $(DESTDIR),--destdir '$(DESTDIR)')

prove-bare: ## `make run` and the tests in a bare SUITE=bookworm|trixie
	@tools/bare-machine $(or $(SUITE),bookworm) $(A)

.PHONY: dist prove-packages
dist: ## a Debian package for this release, a wheel and the release's notes in build/dist (docs/packages.md); A='deb wheel notes'
	@tools/setup test
	@.venv/bin/python tools/dist.py build/dist $(A)

prove-packages: ## install, use, upgrade and remove what `make dist` has made, in a bare machine; SUITE=trixie makes it there before
	@tools/prove-packages $(SUITE)

clean: ## remove what was built here; kernels stay in KATA_CACHE_DIR
	@tools/clean
