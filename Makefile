# The verbs of this repository. Each does the set-up that it needs: on a fresh machine with Python
# 3.11 to 3.14, pip, make and a compiler, `make demo` and `make test` are all there is to type.

.ONESHELL:
.SHELLFLAGS := -euc
.DEFAULT_GOAL := help
.PHONY: help demo test lint links bench gpu size clean

VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
# Tried in this order; name your own with `make test PYTHON=/path/to/python3.12`.
PYTHON  := python3.14 python3.13 python3.12 python3.11 python3
# Of one `make gpu`; the next call continues where it stopped.
MINUTES := 9
# Where `make gpu` leaves rows, logs and what it has done.
RESULTS := bench/results
# What stays in the environment, and what pip downloads before it unpacks.
DISK_GB := 8
TEMP_GB := 3
# Prints major.minor; fails where argrpo would not run.
define SUPPORTED
from sys import version_info as v; print("%d.%d" % v[:2]); exit(not (3, 11) <= v[:2] <= (3, 14))
endef

# Triton 3.9 warns while this is unset and 3.10 changes its default: set, bits stay where they are.
export TRITON_DEFAULT_FP_FUSION := 1
# Scripts in bench/ import the file beside them, which this setting of some shells forbids.
unexport PYTHONSAFEPATH

help:
	@cat <<-'TEXT'
	make demo    set up, then train the embedded digits task and write runs/.../report.html
	make test    set up, then run all tests (kernels in Triton's interpreter)
	make lint    ruff, formatting, mypy
	make links   the symlink view .links/ that IDEs and mypy read
	make bench   rows of this CPU into bench/results/, in some ten minutes
	make gpu     on a machine with a CUDA GPU: its tests and benches, rows into bench/results/
	make size    lines per file; over 300 is marked
	make clean   what make and the tools left behind; the environment stays (remove .venv for that)
	TEXT

demo: $(STAMP)
	@$(BIN)/argrpo demo

# Two processes, since Triton's interpreter replaces the compiler for the whole of one, and at the
# same time, since each keeps one core busy. What the first says is shown when both are done.
test: $(STAMP)
	@status=0
	said=$$(mktemp)
	TRITON_INTERPRET=1 $(BIN)/pytest tests/kernels >"$$said" 2>&1 &
	kernels=$$!
	trap 'kill $$kernels 2>/dev/null || true; rm -f "$$said"' EXIT
	env -u TRITON_INTERPRET $(BIN)/pytest --ignore=tests/kernels || status=1
	wait $$kernels || status=1
	cat "$$said"
	exit $$status

lint: $(STAMP) links
	@status=0
	$(BIN)/ruff check . || status=1
	$(BIN)/ruff format --check . || status=1
	$(BIN)/mypy -p argrpo || status=1
	exit $$status

# kernels/ and engine/ are mapped by setup.py, which static tools do not run: they read this view.
links:
	@rm -rf .links
	mkdir -p .links/argrpo
	for item in argrpo/* kernels engine; do ln -s "../../$$item" .links/argrpo/; done

bench: $(STAMP)
	@$(BIN)/python bench/cpu_suite.py

# Machines with a GPU often bring their own torch: the environment is used where it stands, else
# the python on PATH; where argrpo is not installed into that, the view above stands in for it.
gpu:
	@python=python3
	if [ -e $(STAMP) ]; then python=$(BIN)/python; fi
	if ! "$$python" -P -c 'import argrpo.kernels' 2>/dev/null; then
	    $(MAKE) --silent links
	    export PYTHONPATH="$$PWD/.links"
	fi
	"$$python" bench/gpu_suite.py --minutes $(MINUTES) --results $(RESULTS)

size:
	@git ls-files '*.py' | xargs wc -l | sort -n |
	    awk '{ print $$0 ($$1 > 300 && $$2 != "total" ? "  over 300" : "") }'

clean:
	@rm -rf .links build dist argrpo.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name $(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# A second call finds the stamp and installs nothing; a changed setup.py installs what it added.
$(STAMP): setup.py
	@stop() { printf 'argrpo: %s\n' "$$*" >&2; exit 1; }
	free_gb() { df -Pk "$$1" | awk 'NR == 2 { print int($$4 / 1048576) }'; }
	room() {  # folder, GB needed, remedy
	    [ "$$(free_gb "$$1")" -ge "$$2" ] ||
	        stop "$$1: about $$2 GB of free disk needed, found $$(free_gb "$$1") GB; $$3"
	}
	[ "$$(uname -s)" = Linux ] ||
	    stop "needs Linux, found $$(uname -s): Triton is built for Linux only (WSL2 will do)"
	if ! $(BIN)/python -I -m pip --version >/dev/null 2>&1; then
	    temp=$${TMPDIR:-/tmp}
	    need=$(DISK_GB)
	    if [ "$$(stat -c %d .)" = "$$(stat -c %d "$$temp")" ]; then need=$$((need + $(TEMP_GB))); fi
	    room . $$need "free some, or clone to a larger disk"
	    room "$$temp" $(TEMP_GB) "name a larger folder: TMPDIR=/path make ..."
	    chosen= bare=
	    for python in $(PYTHON); do
	        # Run it, not only look for it: version managers leave names on PATH that do not start.
	        version=$$("$$python" -I -c '$(SUPPORTED)' 2>/dev/null) || continue
	        if "$$python" -I -c 'import ensurepip, venv' 2>/dev/null; then
	            chosen=$$python
	            break
	        fi
	        bare=$${bare:-python$$version}
	    done
	    [ -n "$$chosen$$bare" ] ||
	        stop "needs Python 3.11 to 3.14, none of these runs: $(PYTHON);" \
	            "install one, or name it: make PYTHON=/path/to/python3.12 ..."
	    [ -n "$$chosen" ] ||
	        stop "$$bare has no venv module; on Debian or Ubuntu: sudo apt install $$bare-venv"
	    echo "argrpo: Python $$version, new environment $(VENV): $(DISK_GB) GB, some minutes"
	    "$$chosen" -I -m venv --clear $(VENV)
	fi
	$(BIN)/python -I -m pip install --quiet 'pip>=24' 'setuptools>=70.1'
	$(BIN)/python -I -m pip install --no-build-isolation -e '.[dev]'
	touch $@
