"""What each assignment asks for: functions, points, the tests that decide."""
import dataclasses


@dataclasses.dataclass
class Task:
    """One function to write.

    files: tests/test_FILE.py, in the order in which they run. only: pytest's -k, which of their
    tests. tells: a regular expression; a test whose text has it gives the answer away, and is not
    in the hand-out. twins: functions elsewhere, FILE::FUNCTION, that do the same and are emptied,
    too (in extras/ and results/ those of the same name are found by themselves).
    """

    points: int
    files: str
    only: str = ""
    tells: str = ""
    twins: str = ""

    def pytest(self):
        """The words after `pytest`."""
        files = [f"tests/test_{name}.py" for name in self.files.split()]
        return [*files, "-m", "not slow", "-k", self.only]


TASKS = {
    "A1": {
        "vqkd.py::nearest_code": Task(
            7, "nearest_code properties", "test_nearest_code or no_code_is_nearer",
            tells=r"arg(min|max)\(dim=-?1\)|l2\(book\)\.T|distance\.amin"),
        "vqkd.py::straight_through": Task(5, "straight_through"),
    },
    "A2": {
        "vqkd.py::vqkd_loss": Task(
            5, "vqkd_loss", "not head_of_its_own and not map_of_codes",
            tells=r"1 - (cosine|x\[.cosine)|a @ b|mse_loss\(h",
            twins="extras/bench.py::bench_quantizer"),
        "vqkd.py::code_sums": Task(
            3, "ema properties", "sums and not count_of_use",
            tells=r"one_hot.*T @|index_add"),
        "vqkd.py::ema_update": Task(
            4, "ema properties", "codes_stay or chosen or average or unused or handed_in or "
            "decay_0 or codebook_term", tells=r"direction\) /"),
    },
    "A3": {
        "vqkd.py::kmeans": Task(5, "ema properties", "kmeans or centre", tells=r"by_hand\[k\] = ",
                             twins="results/ablate.py::without_l2"),
        "support/codebook.py::codebook_usage": Task(
            4, "ema codebook_health properties", "perplexity or entropy or commonest or usage or "
            "ten_most or used_code", tells=r"math\.exp\(entropy"),
        "support/codebook.py::restart_dead_codes": Task(
            3, "codebook_health", "dead_code or restarted or threshold"),
    },
    "A4": {
        "pretrain.py::sample_block_mask": Task(
            3, "block_mask properties", "mask or hidden or block"),
        "pretrain.py::sample_block": Task(4, "block_mask properties", "mask or hidden or block"),
        "pretrain.py::hidden_patches": Task(
            2, "block_mask", "hidden_patches_are or refused", tells=r"nonzero\(\)\[:, 1\]"),
        "pretrain.py::mim_loss": Task(
            3, "mim_loss", "loss_of or certain or one_number or both_heads or shallow or graph or "
            "untrained", tells=r"cross_entropy\(logits|softmax\(1\) - ",
            twins="results/ablate.py::regress"),
    },
    "A5": {
        "pretrain.py::aggregate": Task(
            3, "aggregation", "aggregat or cls_head", tells=r"cat\(\[last|early\[:, 1:\]"),
        "pretrain.py::BEiT.streams": Task(
            5, "aggregation", "layer_l or second_loss or shallow or head or hidden or logits or "
            "tokens or stream", tells=r"in model\.cls_pt_layers:\n"),
        "pretrain.py::BEiT.forward": Task(
            4, "aggregation", "second_loss or shallow or head or hidden or logits or tokens",
            tells=r"lm_head\(model\.norm"),
    },
    "A6": {
        "linprobe.py::readout": Task(
            2, "linprobe", "readouts_take or summary_holds", tells=r"mean = \(tokens"),
        "linprobe.py::accuracy": Task(2, "linprobe properties", "accuracy_ or more_guesses"),
        "linprobe.py::knn": Task(2, "linprobe", "knn", tells=r"temperature|\.exp\("),
        "finetune.py::layer_of": Task(2, "layer_decay", twins="segment.py::layer_of"),
        "finetune.py::smooth_targets": Task(
            2, "finetune properties", "smoothing or targets", tells=r"0\.02, 0\.92"),
        "finetune.py::soft_cross_entropy": Task(
            2, "finetune properties", "soft_cross or targets", tells=r"label_smoothing=0\.1"),
    },
}
