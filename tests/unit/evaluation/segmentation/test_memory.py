from ijepa.evaluation.protocols import load_protocol, presets
from ijepa.evaluation.segmentation.memory import planned_memory


def test_planned_memory_of_presets_is_limited() -> None:
    """COCO-Stuff's 118,287 training and 5,000 validation images with a ViT-H/16, and 20 times as many of each."""
    for name in presets("segmentation"):
        rule = load_protocol("segmentation", name)
        sizes = {"width": 1280, "patch_size": 16, "classes": 27}
        most = [
            sum(planned_memory(rule, support=118287 * times, samples=5000 * times, **sizes).values()) / 1e9
            for times in (1, 20)
        ]
        assert most[0] < 30, name
        if rule.method in ("retrieval", "hummingbird"):
            assert most[1] < 30, name


def test_planned_memory_of_a_faiss_search_has_a_float32_copy_for_each_distance() -> None:
    rule = load_protocol("segmentation", "capi")
    sizes = {"support": 10, "samples": 10, "width": 64, "patch_size": 16, "classes": 5}
    approximate = rule.model_copy(update={"retrieval": rule.retrieval.model_copy(update={"search": "faiss"})})
    assert planned_memory(approximate, **sizes)["search"] == 2 * 4 * 64 * 10 * 14**2
