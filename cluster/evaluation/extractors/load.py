"""Which extractors there are, and how one is loaded from the file or object that holds its weights."""

from fnmatch import fnmatchcase

from freeguide.cluster.evaluation.extractors import dinov2, evaluator, inception
from freeguide.cluster.evaluation.extractors.features import Extractor, Loader
from freeguide.cluster.evaluation.extractors.roles import ROLES
from freeguide.configs.errors import DataError
from freeguide.data_pipeline.store.base import Access
from freeguide.data_pipeline.store.open import read_object

# The first whose files have such a name reads them.
EXTRACTORS: dict[str, Loader] = {"evaluator": evaluator.LOADER, "inception": inception.LOADER, "dinov2": dinov2.LOADER}


def load_extractor(uri: str, sha256: str = "", access: Access | None = None) -> Extractor:
    """The extractor whose weights stand at `uri`, a path or `s3://...`, known by the name of the file.

    `sha256` is the hash that it has to have; "" = any. `access` is how S3 is asked. Raises DataError for other names, missing
    files and wrong hashes, StoreError where the store does not answer.
    """
    extractor = _load(uri, access)
    if sha256 and sha256 != extractor.hash:
        raise DataError(f"{uri} has the hash {extractor.hash} and not {sha256}; correct the path, or the hash it is pinned to")
    return extractor


def load_judge(uri: str, sha256: str = "", access: Access | None = None) -> Extractor:
    """`load_extractor` of weights that FID is measured with: of none with a role, whose distance has a column of its own."""
    extractor = load_extractor(uri, sha256, access)
    for name, role in ROLES.items():
        if extractor.name == role.extractor:
            raise DataError(
                f"{uri} holds {role.title}, which has no classes and so no Inception score; name it as {name}, beside another"
            )
    return extractor


def load_beside(role: str, uri: str, sha256: str = "", access: Access | None = None) -> Extractor:
    """`load_extractor` of weights that have to be those of `role`, a name in ROLES."""
    extractor, wanted = load_extractor(uri, sha256, access), ROLES[role]
    if extractor.name != wanted.extractor:
        raise DataError(
            f"{uri} holds {extractor.name} and not {wanted.title}, which {wanted.gives} needs; give the path of {wanted.title}'s "
            "weights"
        )
    return extractor


def _load(uri: str, access: Access | None) -> Extractor:
    name = uri.rsplit("/", 1)[-1]
    loader = next((one for one in EXTRACTORS.values() if fnmatchcase(name, one.files)), None)
    if loader is None:
        names = ", ".join(f"{one.example} ({kind})" for kind, one in EXTRACTORS.items())
        raise DataError(f"{uri} does not say which extractor it holds; give it a name such as {names}")
    return loader.read(read_object(uri, loader.source, access, loader.most), uri)
