"""`harness diagnose`: which stage a gap in quality comes from, measured stage by stage.

subject.py      what is diagnosed: a sample set with its run, records, training and reference images
expectation.py  what is expected: of another run or record, of a reference point, else of the run's own protocol
finding.py      the result of a stage
data.py         stages data and labels
training.py     stages loss and EMA
sampling.py     stages sampler, decoder and uint8
evaluation.py   stages evaluator, N and reference
run.py          all stages in turn, and the sentence at the end
"""
