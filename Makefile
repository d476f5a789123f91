# make demo    both phases on real text in a few minutes of CPU, and what came of them
# make test    every test
# Both make a virtual environment and install what they need.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python

.PHONY: demo test clean

demo: $(VENV)/installed data/sotu_bytes/meta.json
	$(PY) train.py config/gpt2_demo.py --overwrite=True
	$(PY) train.py config/gpt2_demo_continued.py --overwrite=True
	$(PY) train.py config/mom_demo.py --overwrite=True
	@echo; $(PY) sample.py --source=out/mom_demo --prompt="The state of the Union"
	@echo; $(PY) bench.py runs --of=out/gpt2_demo,out/gpt2_demo_continued,out/mom_demo

data/sotu_bytes/meta.json: $(VENV)/installed
	$(PY) prepare.py --dataset=sotu --tokenizer=bytes

test: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m pytest -q

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) out data
