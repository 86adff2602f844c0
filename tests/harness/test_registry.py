import pytest

from harness.errors import UserError
from harness.registry import Registry, backbones, datasets, features, objectives, protocols, samplers, suites
from harness.spec import BackboneSpec


def spec(name):
    return BackboneSpec(name=name, defaults={"num_classes": 3}, builders={"torch": "nowhere:Nothing"})


def fresh():
    registry = Registry("harness.no-such-group", "backbone", BackboneSpec)
    registry.names()
    return registry


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown backbone 'dit-xl2'; did you mean dit-xl-2"):
        backbones.get("dit-xl2")


@pytest.mark.parametrize("name", ["frobnicator", "u-vit-2xs-2"])
def test_an_unknown_name_may_be_of_a_package_that_is_not_installed(name):
    with pytest.raises(
        UserError, match=r"'; (known:|did you mean) .*; one of your own needs pip install -e FOLDER, or"
    ):
        backbones.get(name)


def test_a_built_in_name_is_taken_also_before_anything_is_loaded():
    registry = Registry("harness.backbones", "backbone", BackboneSpec)
    with pytest.raises(UserError, match="'dit-xl-2' is taken by backbone-harness"):
        registry.register(spec("dit-xl-2"))
    assert registry.problems == []


def test_a_name_is_never_replaced():
    registry = fresh()
    first = registry.register(spec("mine"), "first-package")
    with pytest.raises(UserError, match="'mine' is taken by first-package"):
        registry.register(spec("mine"), "second-package")
    assert registry.get("mine") is first


def test_register_serves_as_a_decorator_of_a_function():
    registry = fresh()

    @registry.register
    def family():
        return [spec("a"), spec("b")]

    assert registry.names() == ["a", "b"]
    assert callable(family)


@pytest.mark.parametrize("wrong", ["text", 3, object()])
def test_what_is_no_spec_is_refused(wrong):
    with pytest.raises(UserError):
        fresh().register(wrong, "some-package")


@pytest.mark.parametrize("registry", [backbones, datasets, features, objectives, protocols, samplers, suites])
def test_built_ins_come_through_the_entry_points_without_problems(registry):
    assert registry.names()
    own = [name for name in registry.names() if registry.owner(name) == "backbone-harness"]
    assert own, registry.group
    assert [problem for problem in registry.problems if problem.distribution == "backbone-harness"] == []


def test_spec_refuses_unknown_arguments_and_frameworks():
    with pytest.raises(UserError, match="has no argument 'depht'"):
        spec("x").arguments(depht=3)
    with pytest.raises(UserError, match="not implemented for 'jax'"):
        spec("x").build("jax")
    with pytest.raises(UserError, match="cannot be loaded"):
        spec("x").build("torch")
    with pytest.raises(UserError, match="kind 'gan'"):
        BackboneSpec(name="x", kind="gan", builders={"torch": "a:b"})


def test_null_index():
    assert BackboneSpec(name="x", null_label="num_classes", builders={"torch": "a:b"}).null_index(10) == 10
    assert BackboneSpec(name="x", null_label=0, builders={"torch": "a:b"}).null_index(10) == 0
    assert BackboneSpec(name="x", builders={"torch": "a:b"}).null_index(10) is None


def test_a_framework_that_is_not_installed_is_named_with_its_remedy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jax", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "backbones.dit.flax_model", raising=False)
    monkeypatch.delitem(sys.modules, "backbones.flax_layers", raising=False)
    with pytest.raises(UserError, match=r"pip install 'backbone-harness\[jax\]'"):
        backbones.get("dit-xs-2").build("jax")


def test_a_network_in_jax_is_built_with_rngs_also_by_an_inherited_init(monkeypatch):
    """The metaclass of nnx.Module hides the signature of its classes."""
    from flax import nnx

    class WithRngs(nnx.Module):
        def __init__(self, *, width, rngs):
            self.width, self.rngs = width, rngs

    class Inherits(WithRngs):
        pass

    for network in (WithRngs, Inherits):
        monkeypatch.setattr(BackboneSpec, "builder", lambda self, framework, network=network: network)
        made = BackboneSpec(name="x", builders={"jax": "a:b"}, defaults={"width": 3}).build("jax")
        assert made.width == 3 and type(made) is network and isinstance(made.rngs, nnx.Rngs)
