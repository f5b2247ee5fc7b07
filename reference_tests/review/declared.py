"""Which of the catalogue's mistakes `kata review` should see, and by which rule.

Declared by reading the mistakes, not by running the rules: what is listed and not found is a miss.
"""

DECLARED = {
    "01_embedding_table/bag-max-norm": "max-norm",
    "01_embedding_table/float32-ids": "ids-as-floats",
    "01_embedding_table/helper-on-the-cpu": "made-on-the-cpu",
    "01_embedding_table/init-seeds-itself": "global-seed",
    "01_embedding_table/max-norm-mutates": "max-norm",
    "01_embedding_table/python-hash": "python-hash",
    "01_embedding_table/loop-over-bags": "loop-over-rows",
    "01_embedding_table/one-hot-lookup": "one-hot-product",
    "02_tower/dropout-in-eval": "dropout-without-mode",
    "02_tower/zero-row-nan": "norm-without-eps",
    "02_tower/loop-over-rows": "loop-over-rows",
    "03_contrastive_loss/ids-as-floats": "ids-as-floats",
    "03_contrastive_loss/inputs-changed": "input-changed",
    "03_contrastive_loss/log-q-changed": "input-changed",
    "03_contrastive_loss/weights-changed": "input-changed",
    "04_cross_layer/bce-of-sigmoid": "loss-on-probabilities",
    "04_cross_layer/dropout-always": "dropout-without-mode",
    "04_cross_layer/in-place-residual": "input-changed",
    "04_cross_layer/log-of-softmax": "log-of-softmax",
    "05_training_loop/load-executes-code": "unsafe-load",
    "05_training_loop/loss-item": "wait-in-step",
    "05_training_loop/loss-to-the-cpu": "wait-in-step",
    "06_ndcg/clamped-log-loss": "loss-on-probabilities",
    "06_ndcg/log-after-sigmoid": "log-of-softmax",
    "06_ndcg/logits-taken-for-probabilities": "loss-on-probabilities",
    "06_ndcg/nan-filled-in-place": "input-changed",
    "06_ndcg/probabilities-clipped": "loss-on-probabilities",
    "08_llm_pooling/divided-by-zero-norm": "norm-without-eps",
    "08_llm_pooling/hash-as-key": "python-hash",
    "08_llm_pooling/hash-of-a-string": "python-hash",
    "08_llm_pooling/pickled-cache": "unsafe-load",
    "09_serving/waits-for-company": "batching-timer",
}
