# make demo    both phases on real text in a few minutes of CPU, and what came of them
# make systems every system of the paper, 200 steps each from the demo's phase one: 6 minutes
# make reproduce    the paper's tables and figures at a small scale, hours; goes on where it stopped. ARGS="--only=table1"
# make gpu     what only a GPU can show, within BUDGET=25 minutes, into out/gpu/report.md
# make test    every test
# Each makes a virtual environment and installs what it needs; TORCH='torch>=2.11' takes the newest torch.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
PY     := $(VENV)/bin/python

.PHONY: demo systems reproduce gpu test clean

demo: $(VENV)/installed data/sotu_bytes/meta.json
	$(PY) train.py config/gpt2_demo.py --overwrite=True
	$(PY) train.py config/gpt2_demo_continued.py --overwrite=True
	$(PY) train.py config/mom_demo.py --overwrite=True
	@echo; $(PY) sample.py --source=out/mom_demo --prompt="The state of the Union"
	@echo; $(PY) bench.py runs --of=out/gpt2_demo,out/gpt2_demo_continued,out/mom_demo
	@echo; $(PY) analyze.py --source=out/mom_demo --curves=out/gpt2_demo,out/gpt2_demo_continued,out/mom_demo

# Layer-skip, MoE and the others differ in their settings alone. MIXTRAL is the routing of a Mixtral layer.
SYSTEM  = $(PY) train.py config/mom_demo.py --max_steps=200 --eval_every=200 --log_every=100 --overwrite=True
MIXTRAL = --router=linear --router_weights=softmax --tau=1.0 --skip=False
LAYERS  = --chunks=1-1-1-1-1-1

systems: $(VENV)/installed data/sotu_bytes/meta.json
	test -e out/gpt2_demo/best.pt || $(PY) train.py config/gpt2_demo.py --overwrite=True
	$(SYSTEM) --out_dir=out/systems/vanilla $(LAYERS)
	$(SYSTEM) --out_dir=out/systems/mom_k2h6s --H=6
	$(SYSTEM) --out_dir=out/systems/mom_k3h2s --K=3 --H=2
	$(SYSTEM) --out_dir=out/systems/mom_k3h1s --K=3 --H=1
	$(SYSTEM) --out_dir=out/systems/mom_same --H=6 --tied=True
	$(SYSTEM) --out_dir=out/systems/moe $(LAYERS) --phi=moe $(MIXTRAL)
	$(SYSTEM) --out_dir=out/systems/moe_share --phi=moe_share $(MIXTRAL)
	$(SYSTEM) --out_dir=out/systems/mod $(LAYERS) --phi=mod --K=1 --router=linear
	$(SYSTEM) --out_dir=out/systems/layer_skip --phi=layer_skip --K=1
	$(SYSTEM) --out_dir=out/systems/early_exit --phi=early_exit --K=1
	$(SYSTEM) --out_dir=out/systems/share --phi=share --K=1 '--c_share=[0,0,2,2]'
	@cd out/systems && echo && $(abspath $(PY)) ../../bench.py runs --out_dir=../bench \
	  --of=vanilla,mom_k2h6s,mom_k3h2s,mom_k3h1s,mom_same,moe,moe_share,mod,layer_skip,early_exit,share

reproduce: $(VENV)/installed
	$(PY) reproduce.py $(ARGS)

BUDGET ?= 25
gpu: $(VENV)/installed-dev
	$(PY) gpu.py --budget=$(BUDGET)

data/sotu_bytes/meta.json: $(VENV)/installed
	$(PY) prepare.py --dataset=sotu --tokenizer=bytes

test: $(VENV)/installed-dev
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q '$(TORCH)' -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
