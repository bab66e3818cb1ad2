"""The fine-tune: texts and a checkpoint to a Hugging Face folder with a longer window.

options: what a user may choose
choose: what was left open, chosen
plan: `TrainingPlan`, the steps before they run
memory: what a plan takes: memory and disk
speed: operations of a run, and how long they take on a machine
batches: rows to micro-batches, their positions and masks
lora: which weights are adapted, which trained whole
losses: the loss without logits
head: that of a head with its gradients, on a CPU
sparse: attention within groups of tokens
tiles: MLPs a tile of tokens at a time
compiled: layers compiled, in long runs on a CPU
processes: the processes of torchrun and accelerate launch
callbacks: what is shown, kept and measured while it runs
trainer: the run itself
validation: what it is worth while it runs and at its end
folder: the Hugging Face folder that it writes
extend: the command
"""
