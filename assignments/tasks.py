"""What each assignment asks for: functions, points, tests."""
import dataclasses


@dataclasses.dataclass
class Task:
    """One function to write. Tests: pytest's names, without tests/test_ and .py."""

    points: int
    tests: str
    answers: str = ""    # of all tests, those whose text holds the answer: not in the hand-out

    def test_names(self):
        """As pytest wants them: tests/test_FILE.py or tests/test_FILE.py::test_NAME."""
        parts = [name.partition("::") for name in self.tests.split()]
        return [f"tests/test_{file}.py{colons}{test}" for file, colons, test in parts]


TASKS = {
    "A1": {
        "vqkd.py::nearest_code": Task(
            6, "nearest_code properties::test_no_code_is_nearer_than_the_nearest_whatever_the_"
            "lengths"),
        "vqkd.py::straight_through": Task(4, "straight_through"),
    },
}
