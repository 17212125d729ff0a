"""Which files of a folder are pictures, and what becomes of all the others.

    find_images        the picture files at any depth below a folder
    labelled_files     those of root/SPLIT/CLASS        unlabelled_files   those of any folder
    LeftOut            the files that are not used, with the reason: no file is dropped in silence
    read_text          a text file, whichever editor saved it

The sorted order is that of the paths, so every machine numbers the pictures alike.
"""
import contextlib
import functools
import os
import re
import unicodedata

from support.files import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif",
                 ".ppm", ".pgm", ".pbm", ".pnm")
# How the contents of a picture begin. Read only in files without an ending.
BEGINNINGS = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0{4}|RIFF.{4}WEBP|II\*\0|MM\0\*"
                        rb"|.{4}ftyp(avif|heic|heix|mif1)", re.DOTALL)
# Folders and files of label maps: a picture NAME has its map in masks/NAME or NAME_mask.
LABEL_WORDS = frozenset(
    "annotation annotations annot annots mask masks label labels labelmap labelmaps gt gtfine "
    "gtcoarse groundtruth segmentation segmentations segmentationclass segmentationobject seg "
    "segs trimaps labelids labeltrainids instanceids".split())
IMAGE_WORDS = frozenset(
    "image images img imgs jpegimages leftimg8bit photo photos picture pictures rgb frames".split())
SPLIT_NAMES = (("train", "val"), ("training", "validation"))


# --- what is left out -----------------------------------------------------------------------------
class LeftOut(dict):
    """{reason: paths of the files that are not used}"""

    def add(self, reason, path):
        self.setdefault(reason, set()).add(os.fspath(path))

    def merge(self, other):
        for reason, paths in other.items():
            self[reason] = self.get(reason, set()) | paths

    def text(self, root, most=6):
        """One sentence: how many for which reason, with an example of each; "" if there is none."""
        reasons = sorted(self, key=lambda reason: (-len(self[reason]), reason))
        parts = []
        for reason in reasons[:most]:
            example = os.path.relpath(min(self[reason]), root)
            parts.append(f"{len(self[reason])} {reason} ({shown(example)})")
        rest = sum(len(self[reason]) for reason in reasons[most:])
        if rest:
            parts.append(f"{rest} others")
        return f"files of {shown(root)} left out: {', '.join(parts)}" if parts else ""


def leave_out_below(folder, reason, left_out):
    """Count every file below a folder that is not read. A link to a folder counts as one file."""
    if os.path.islink(folder):
        left_out.add(reason, folder)
        return
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            hidden = name.startswith(".")
            left_out.add("hidden" if hidden else reason, os.path.join(here, name))


def leave_out_beside(root, used, left_out):
    """Count what lies in `root` beside the folders and files `used`, which are read."""
    folders, files = entries_of(root, left_out)
    maps = label_folders(folders)
    reason = "outside the folders that are read"
    for name in folders:
        if name not in used:
            leave_out_below(os.path.join(root, name),
                            "label maps" if name in maps else reason, left_out)
    for name in files:
        if name not in used:
            left_out.add(reason, os.path.join(root, name))


def shown(path):
    """A path or name on one line, for a message: line breaks and bytes that are no text escaped."""
    text = os.fsdecode(path)
    with contextlib.suppress(UnicodeEncodeError):            # half a character, on Windows
        # Where the locale is not UTF-8, Python takes the bytes of a letter like ü for no text.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text)


# --- one folder -----------------------------------------------------------------------------------
@functools.cache
def more_formats():
    """{ending: Pillow's name} of the formats that only some installations read."""
    from PIL import features
    more = {}
    if features.check("avif"):
        more[".avif"] = "AVIF"
    with contextlib.suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
        more |= {".heic": "HEIF", ".heif": "HEIF"}
    return more


def entries_of(folder, left_out=None):
    """-> names of the folders and of the files in `folder`, without hidden ones.

    Both lists are empty if there is no such folder. A link that leads nowhere counts as a file if
    it is called as a picture is: reading it then says what is wrong.
    """
    left_out = LeftOut() if left_out is None else left_out
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return folders, files
    except OSError as error:                 # to pass over it would drop its pictures in silence
        raise UserError(f"cannot look into the folder {shown(folder)} ({error.strerror}): "
                        f"change its permissions, or move it away") from error
    for entry in found:
        kind = kind_of(entry)
        if kind == "folder":
            folders.append(entry.name)
        elif kind == "file" or (kind == "links to nowhere" and has_image_ending(entry.name)):
            files.append(entry.name)
        else:
            left_out.add(kind, entry.path)
    return folders, files


def kind_of(entry):
    """What an entry of a folder is, links followed: "file", "folder", or why it is not used."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:                          # a link to itself
        return "links to nowhere"
    return "links to nowhere" if entry.is_symlink() else "neither file nor folder"


def has_image_ending(name):
    ending = os.path.splitext(name)[1].lower()
    return ending in IMAGE_ENDINGS or ending in more_formats()


def why_no_picture(path):
    """"" for a picture file, by its ending or, without an ending, by how it begins."""
    ending = os.path.splitext(path)[1].lower()
    if has_image_ending(path):
        return ""
    if ending in (".heic", ".heif"):
        return f"{ending} (pip install pillow-heif reads them)"
    if ending:
        return shown(ending)
    try:
        with open(path, "rb") as file:
            beginning = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read {shown(path)} ({error.strerror}): "
                        f"change its permissions, or move it away") from error
    return "" if BEGINNINGS.match(beginning) else "without an ending, no pictures"


# --- label maps -----------------------------------------------------------------------------------
def words_of(name):
    return tuple(re.findall(r"[^\W_]+", name.lower()))


def label_folders(folders):
    """Those of sibling folders that hold label maps: masks beside images, x_masks beside x_images.

    Names alone tell: a folder called masks counts only beside one called images.
    """
    known = {words_of(name) for name in folders}
    found = set()
    for name in folders:
        words = words_of(name)
        if words and words[-1] in LABEL_WORDS:
            beside = [(*words[:-1], image) for image in IMAGE_WORDS]
            if known.intersection(beside) or (len(words) > 1 and words[:-1] in known):
                found.add(name)
    return found


def label_files(folder, names):
    """Those of the picture files in a folder that are label maps of others there.

    NAME_mask.png beside NAME.jpg; NAME.png beside NAME.jpg if it has one channel.
    """
    kinds = {}
    for name in names:
        stem, ending = os.path.splitext(name)
        kinds.setdefault(stem, set()).add(ending.lower())
    found = set()
    for name in names:
        stem, ending = os.path.splitext(name)
        match = re.fullmatch(r"(.+)[ _.-]+([^\W_]+)", stem)
        if match and match[2].lower() in LABEL_WORDS and match[1] in kinds:
            found.add(name)
        elif ending.lower() == ".png" and len(kinds[stem]) > 1:
            if has_one_channel(os.path.join(folder, name)):
                found.add(name)
    return found


def has_one_channel(path):
    """Whether a picture holds one number for each pixel; False for one that cannot be read."""
    from PIL import Image
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.mode in ("1", "L", "P", "I", "I;16")
    except Exception:                        # a decoder may raise anything on a broken file
        return False


# --- finding pictures -----------------------------------------------------------------------------
def find_images(folder, left_out=None):
    """All picture files at any depth below a folder, sorted. left_out receives all other files.

    Links to folders are followed, except back to a folder that we are in. Label maps beside images
    are no pictures.
    """
    left_out = LeftOut() if left_out is None else left_out
    found = []
    collect(folder, found, left_out, above=())
    return sorted(found)


def collect(folder, found, left_out, above):
    """Add the pictures below a folder to `found`.  above: the folders that we are in"""
    here = os.path.realpath(folder)
    if here in above:
        left_out.add("links back to a folder above", folder)
        return
    folders, files = entries_of(folder, left_out)
    pictures = []
    for name in files:
        reason = why_no_picture(os.path.join(folder, name))
        if reason:
            left_out.add(reason, os.path.join(folder, name))
        else:
            pictures.append(name)
    maps = label_files(folder, pictures)
    for name in pictures:
        if name in maps:
            left_out.add("label maps", os.path.join(folder, name))
        else:
            found.append(os.path.join(folder, name))
    maps = label_folders(folders)
    for name in folders:
        if name in maps:
            leave_out_below(os.path.join(folder, name), "label maps", left_out)
        else:
            collect(os.path.join(folder, name), found, left_out, (*above, here))


def unlabelled_files(root, split, left_out):
    """-> paths of the images of a split; split None is all, or a single file.

    The folders train/ and val/ are taken if they exist, or training/ and validation/ in images/,
    as segmentation data sets have them. Without val/, every 20th image is held out in its place.
    """
    if split is None:
        return [str(root)] if os.path.isfile(root) else find_images(root, left_out)
    base = str(root)
    names = SPLIT_NAMES[0]
    if not any(os.path.isdir(os.path.join(base, name)) for name in names):
        images = os.path.join(base, "images")
        for pair in SPLIT_NAMES:
            if all(os.path.isdir(os.path.join(images, name)) for name in pair):
                leave_out_beside(base, ["images"], left_out)
                base = images
                names = pair
    train, val = (os.path.join(base, name) for name in names)
    if os.path.isdir(val):
        leave_out_beside(base, names, left_out)
        return find_images(train if split == "train" else val, left_out)
    if os.path.isdir(train):
        leave_out_beside(base, names[:1], left_out)
    paths = find_images(train if os.path.isdir(train) else base, left_out)
    return [path for i, path in enumerate(paths) if (i % 20 == 0) == (split == "val")]


# --- class folders --------------------------------------------------------------------------------
def plain_name(name):
    """A name in the one form (NFC) that equal names share: é may be one character, or e and ´."""
    return unicodedata.normalize("NFC", name)


def class_folders(folder, left_out=None):
    """The folders in `folder` by the class they stand for, sorted: {class: names of its folders}.

    A name that is written in two ways is one class.
    """
    left_out = LeftOut() if left_out is None else left_out
    folders, files = entries_of(folder, left_out)
    for path in left_out.get("links to nowhere", ()):
        raise UserError(f"{shown(path)} should be a class folder, but is a link to "
                        f"{shown(os.readlink(path))}, which is not there: mend or remove the link")
    for name in files:
        left_out.add("outside the class folders", os.path.join(folder, name))
    classes = {}
    for name in sorted(folders, key=plain_name):
        classes.setdefault(plain_name(name), []).append(name)
    return classes


def find_classes(root, left_out=None):
    """The names of the class folders of root/train, sorted. root/val must have the same ones."""
    found = {}
    for split in ("train", "val"):
        found[split] = class_folders(os.path.join(root, split), left_out)
        if not found[split]:
            raise UserError(f"{shown(root)} has no class folders {split}/CLASS/*, which give the "
                            f"labels: put the images there")
    odd = sorted(found["train"].keys() ^ found["val"].keys())
    if odd:
        root = shown(root)
        raise UserError(f"{root}/train and {root}/val must hold the same class folders, but only "
                        f"one of them has {shown(', '.join(odd[:5]))}: add or remove it")
    return list(found["train"])


def labelled_files(root, split, classes, left_out):
    """-> paths and labels of the images in root/split/CLASS, class after class."""
    folders = class_folders(os.path.join(root, split))
    paths, labels = [], []
    for number, name in enumerate(classes):
        found = []
        for folder in folders[name]:
            found += find_images(os.path.join(root, split, folder), left_out)
        if not found:
            folder = os.path.join(root, split, name)
            raise UserError(f"the class folder {shown(folder)} holds no image: fill it, or remove "
                            f"it from both splits")
        paths += found
        labels += [number] * len(found)
    leave_out_beside(root, ["train", "val"], left_out)
    return paths, labels


# --- text files -----------------------------------------------------------------------------------
def read_text(path):
    """A text file in UTF-8 or UTF-16, with or without a mark at its beginning; names in NFC.

    Raises OSError or ValueError if that fails.
    """
    with open(path, "rb") as file:
        content = file.read()
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return plain_name(content.decode("utf-16" if marked else "utf-8-sig"))
