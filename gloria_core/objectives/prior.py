"""PRIOR: alignment of radiographs with the sentences of their reports, through prototypes, and reconstruction of both.

Cheng, Lin, Lyu, Huang, Luo, Yuan: "PRIOR: Prototype Representation Joint Learning from Medical Images and Reports",
ICCV 2023. Released code: github.com/QtacierP/PRIOR (`prior.py`). Regions Z, sentences X, their mixtures of prototypes Q
and the bank's logits l (`PrototypeBank`; released code, `spb.py`); image vector G = pool(regions) and report vector
T = pool(Q); "told" and "seen" of the sigmoid attention (`SentenceRegionAttention`); predictor p and stop-gradient sg;
and NCE_s, the mean of both directions of InfoNCE over e^s cos:

    global       = NCE_s(G, T)
    local_image  = -1/2 mean_r [ cos(p(Z), sg(told)) + cos(p(told), sg(Z)) ]
    local_text   = NCE_s'(Q, seen) among the sentences of one report
    prototype    = mean |Q - X|
    image        = mean |image_decoder(Z, told) - pixels|
    report       = mean |P - Q|, P decoded from Z and matched to Q by the Hungarian method on L1
    consistency  = KL( softmax(l(X)) || softmax(l(P)) )
    report_global = NCE_s( pool(mixture of P), T )

Stage 1 (with Q = X): global + local_image + local_text. Stage 2: + 10 prototype. Stage 3: global counts 10 times,
+ image + 10 report + consistency + report_global.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.models.decoders import ImageDecoder, SentenceDecoder
from gloria_core.models.heads import AttentionPool, ImageHeads, contrastive_terms, cosine_matrix, widened
from gloria_core.models.text_encoder import words_from_pieces
from gloria_core.objectives.base import Objective
from gloria_core.types import AttentionRows, Batch, Behavior, ImageFeatures, Needs, ObjectiveOutput, TextFeatures

Decay = Literal["fixed", "linear", "exp"]
LOG_SCALE = math.log(100.0)  # the largest scale when corrected
PAIRS_AT_ONCE = 1 << 25  # region-sentence pairs that `pair_scores` holds at a time
ALIGNMENT = {"global": 1.0, "local_image": 1.0, "local_text": 1.0}
RECONSTRUCTION = {"global": 10.0, "image": 1.0, "report": 10.0, "consistency": 1.0, "report_global": 1.0}
WEIGHTS = {1: ALIGNMENT, 2: ALIGNMENT | {"prototype": 10.0}, 3: ALIGNMENT | {"prototype": 10.0} | RECONSTRUCTION}


class PRIOR(Objective):
    """Global, sentence-region and prototype alignment, then reconstruction of image and report, in three stages.

    `embed_dim`: D; 0 takes the text encoder's width, as published (768).
    `temperature`: 1 / e^s that both contrasts start from; from random weights 0.01 stops the global one from learning.
    `n_prototypes`, `bank_temperature`, `temp_decay`: the bank; from the start of stage 2 to the end, epoch by epoch,
    its temperature falls to a tenth ("linear", "exp") or not ("fixed").
    `n_queries`, `decoder_layers`: sentences that the BERT decoder writes, and all that stage 3 keeps of a report.
    `stage_epochs`, `stage_rates`: epochs of the stages (() shares all out as 20 : 30 : 50; a stage without an epoch is
    skipped), and their shares of the learning rate.
    An objective that was never told a plan, such as a loaded one, is at the end: stage 3, last temperature.
    `behavior`, with the faults of the released code that "corrected" mends:
    - regions: "published" reads the channels-first map of regions as if it were R rows (a view, no transpose): a row
      mixes channels of all positions, and the maps of `attention` have **no place in the image**.
    - matching: "published" takes P[j] for the permutation j instead of its inverse, which pairs P with wrong Q.
    - report decoder: "published" is causal over its queries.
    - noise: "published" draws Gumbel noise in evaluation mode too, so every score is random.
    - scale: outside the loss "published" weighs cosines by s, not e^s; "corrected" also holds e^s to 100 at most.

    Shape: images B, texts N, sentences S, regions R
    """

    needs = Needs(sentence_ids=True, sentence=False, pixels=True)
    rows = AttentionRows(unit="sentence", normalisation="sigmoid")
    has_local_embeddings = True
    attention_formula = r"a_{sr} = \sigma\,( q_2(Q_s) \cdot k_1(Z_r) / \sqrt{D} )"
    encoders = MappingProxyType({"region_stage": "layer4", "last_layers": 1, "max_tokens": 256, "text_section": "both"})

    def __init__(
        self,
        *,
        pooled_dim: int,
        region_dim: int,
        text_dim: int,
        behavior: Behavior = "corrected",
        embed_dim: NonNegativeInt = 0,
        n_prototypes: PositiveInt = 512,
        n_queries: PositiveInt = 16,
        decoder_layers: PositiveInt = 8,
        temperature: PositiveFloat = 0.01,
        bank_temperature: PositiveFloat = 0.9,
        temp_decay: Decay = "fixed",
        stage_epochs: Sequence[NonNegativeInt] = (),
        stage_rates: Annotated[Sequence[PositiveFloat], Field(min_length=3, max_length=3)] = (1.0, 1.0, 0.5),
    ) -> None:
        super().__init__(behavior)
        if stage_epochs and (len(stage_epochs) != 3 or stage_epochs[2] < 1):
            raise ValueError(f"stage_epochs must be three numbers, the last at least 1, got {stage_epochs!r}")
        dim, published = embed_dim or text_dim, behavior == "published"
        self.n_queries, self.bank_temperature, self.temp_decay = n_queries, bank_temperature, temp_decay
        self.stage_epochs, self._rates, self.stage = tuple(stage_epochs), tuple(stage_rates), 3
        self._plan: tuple[int, int, int] | None = None
        self.image_heads = ImageHeads(pooled_dim, region_dim, dim, mixed=published)
        self.text_head, self.text_pool = nn.Linear(text_dim, dim), AttentionPool(dim)
        self.predictor = nn.Sequential(nn.Linear(dim, dim // 2), nn.ReLU(), nn.Linear(dim // 2, dim))
        for layer in (self.image_heads.whole, self.image_heads.local, self.text_head, self.predictor[0]):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        self.cross_attention = SentenceRegionAttention(dim)
        last = decayed(bank_temperature, 1.0, temp_decay)
        self.bank = PrototypeBank(n_prototypes, dim, temperature=last, noisy_in_eval=published)
        self.image_decoder = ImageDecoder(dim)
        self.report_decoder = SentenceDecoder(dim, n_queries=n_queries, layers=decoder_layers, causal=published)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.local_logit_scale = nn.Parameter(self.logit_scale.detach().clone())

    def plan(self, epochs: int) -> tuple[int, ...]:
        """First epochs of the stages that get one; the last epoch is always of stage 3.

        Raises ValueError where `stage_epochs` add up to another number.
        """
        second, third = (2 * epochs + 5) // 10, min((5 * epochs + 5) // 10, epochs - 1)
        if self.stage_epochs:
            if sum(self.stage_epochs) != epochs:
                raise ValueError(f"stage_epochs {self.stage_epochs} are {sum(self.stage_epochs)} epochs, not {epochs}")
            second, third = self.stage_epochs[0], sum(self.stage_epochs[:2])
        self._plan = (second, third, epochs)
        return tuple(sorted({0, second, third}))

    def stage_rates(self) -> tuple[float, ...]:
        """Of the stages that get an epoch, once `plan` was told how many there are."""
        second, third, _ = self._plan
        return tuple(self._rates[(start >= second) + (start >= third)] for start in sorted({0, second, third}))

    @torch.no_grad()
    def on_epoch(self, epoch: int) -> None:
        """Stage and bank temperature of this epoch. Raises RuntimeError before `plan`."""
        if self._plan is None:
            raise RuntimeError("PRIOR trains in stages: call plan(epochs) before on_epoch")
        second, third, epochs = self._plan
        self.stage = 1 + (epoch >= second) + (epoch >= third)
        share = max(0, epoch - second) / max(1, epochs - second)
        self.bank.temperature = decayed(self.bank_temperature, share, self.temp_decay)

    def forward(self, images: ImageFeatures, texts: TextFeatures, batch: Batch | None = None) -> ObjectiveOutput:
        """Loss of B pairs in the present stage; stage 3 reads `batch.pixels`.

        Raises ValueError where images and texts differ in number, a text has no sentence, or stage 3 has no batch.
        """
        if len(images.pooled) != len(texts.tokens):
            raise ValueError(f"PRIOR pairs images with texts: got {len(images.pooled)} and {len(texts.tokens)}")
        if self.stage == 3 and batch is None:
            raise ValueError("stage 3 of PRIOR reconstructs the images: it needs the batch with their pixels")
        sentences, packed, logits = self._sentences(texts)
        used, grid = sentences.padded(packed), images.regions.shape[1:3]
        whole, regions = self.image_heads(images)
        report = self.text_pool.of_set(used, sentences.mask)
        cross = self.cross_attention(regions, used, sentences.mask)
        terms = {
            "global": _nce(whole, report, self._scale(self.logit_scale)),
            "local_image": mutual_prediction(regions, cross.told, self.predictor),
            "local_text": local_nce(used, cross.seen, sentences.mask, self._scale(self.local_logit_scale)),
        }
        if self.stage > 1:
            terms["prototype"] = (packed - sentences.packed).abs().mean()
        if self.stage == 3:
            target = batch.pixels.flatten(0, 1).mean(dim=1, keepdim=True)
            maps = (self.image_heads.as_map(rows, grid) for rows in (regions, cross.told))
            terms["image"] = (self.image_decoder(*maps, size=target.shape[-2:]) - target).abs().mean()
            terms |= self._report_terms(regions, sentences, packed, logits, report)
        total = sum(WEIGHTS[self.stage][name] * term for name, term in terms.items())
        with torch.no_grad():
            attention = sentences.at(cross.of_sentence, texts.word_sentence)[0].unflatten(2, grid)
        return ObjectiveOutput(total=total, terms=terms, attention=attention)

    def _report_terms(
        self, regions: Tensor, sentences: "Sentences", packed: Tensor, logits: Tensor, report: Tensor
    ) -> dict[str, Tensor]:
        """Terms of the report that the decoder writes; queries without a sentence are to give zero vectors."""
        inverse = self.behavior == "corrected"
        written, targets = self.report_decoder.in_order_of(sentences.padded(packed), regions, inverse=inverse)
        kept = written[:, : sentences.mask.shape[1]][sentences.mask]
        true, (mixture, retrieved) = logits.log_softmax(dim=1), self.bank(kept)
        again = self.text_pool.of_set(sentences.padded(mixture), sentences.mask)
        return {
            "report": (written - targets).abs().mean(),
            "consistency": (true.exp() * (true - retrieved.log_softmax(dim=1))).sum(dim=1).mean(),
            "report_global": _nce(again, report, self._scale(self.logit_scale)),
        }

    def _scale(self, logarithm: Tensor) -> Tensor:
        if self.behavior == "published":
            return logarithm.exp()
        # the gradient passes the limit, so that a scale beyond it can come back
        return (logarithm - (logarithm - logarithm.clamp(max=LOG_SCALE)).detach()).exp()

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, N): (c cos(G, T) + a / 2) / (c + 1/2), with the terms of `zero_shot_logits`, c its scale.

        Near chance, classes rank by it as by `zero_shot_scores`; but it compares any text with any image, and is
        nearly a cosine. The local part a (0 to 1) counts for little: no term of the loss makes it large for a pair.
        """
        whole, local, scale = self._pair_scores(images, texts)
        return (scale * whole + local / 2) / (scale + 0.5)

    def zero_shot_scores(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, N) scores of N classes, one prompt each: softmax_n(global) + softmax_n(local) / 2 (released code)."""
        whole, local = self.zero_shot_logits(images, texts)
        return whole.softmax(dim=1) + local.softmax(dim=1) / 2

    def zero_shot_logits(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor]:
        """(B, N) each: c cos(G, T), and the mean sigmoid weight a of regions and sentences, both ways.

        "published": c = s, and a prompt is one sentence that includes `[SEP]`. "corrected": c = e^s, and sentences are
        those of training.
        """
        if self.behavior == "published":
            numbers = (texts.token_mask.long() - 1).index_fill(1, texts.token_words.new_zeros(1), -1)
            texts = replace(texts, token_sentences=numbers)
        whole, local, scale = self._pair_scores(images, texts)
        return scale * whole, local

    def attention(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(N, W, h, w) `of_sentence`: for every word the sigmoid map of its sentence; zero for words outside sentences.

        With behavior "published" the last two axes are the R rows folded to the shape of the grid: no places.
        """
        sentences, packed, _ = self._sentences(texts)
        regions = self.one_image_a_text(self.image_heads(images)[1], len(texts.words))
        cross = self.cross_attention(regions, sentences.padded(packed), sentences.mask)
        return sentences.at(cross.of_sentence, texts.word_sentence)[0].unflatten(2, images.regions.shape[1:3])

    def local_embeddings(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Z as (B, h, w, D), for every word Q of its sentence (N, W, D), and the mask (N, W) of words that have one."""
        sentences, packed, _ = self._sentences(texts)
        words, there = sentences.at(sentences.padded(packed), texts.word_sentence)
        return self.image_heads(images)[1].unflatten(1, images.regions.shape[1:3]), words, there

    def embed_images(self, images: ImageFeatures) -> Tensor:
        """G of the paper."""
        return self.image_heads(images)[0]

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        """T of the paper."""
        sentences, packed, _ = self._sentences(texts)
        return self.text_pool.of_set(sentences.padded(packed), sentences.mask)

    def _pair_scores(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
        sentences, packed, _ = self._sentences(texts)
        used, mask = sentences.padded(packed), sentences.mask
        whole, regions = self.image_heads(images)
        scale = self.logit_scale if self.behavior == "published" else self._scale(self.logit_scale)
        local = self.cross_attention.pair_scores(regions, used, mask)
        return cosine_matrix(whole, self.text_pool.of_set(used, mask)), local, scale

    def _sentences(self, texts: TextFeatures) -> tuple["Sentences", Tensor, Tensor | None]:
        """The sentences X, what stands for them in the present stage (X or Q, packed), and the bank's logits."""
        most = self.n_queries if self.stage == 3 else None
        sentences = gather_sentences(self.text_head(texts.tokens), texts.token_sentences, most=most)
        return (sentences, sentences.packed, None) if self.stage == 1 else (sentences, *self.bank(sentences.packed))


def _nce(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """NCE_s of B pairs."""
    return sum(contrastive_terms(scale * cosine_matrix(left, right))) / 2


class Sentences(NamedTuple):
    """Sentences of N texts, one a row, without gaps: a sentence without a token has no row.

    Shape:
        mask (N, S) bool; table (N, numbers) int64: the row of each sentence number, -1 where it has none
        packed (M, D): the vectors of the M sentences of all texts, text by text
    """

    mask: Tensor
    table: Tensor
    packed: Tensor

    def padded(self, packed: Tensor) -> Tensor:
        """(M, D) -> (N, S, D), zero where there is no sentence."""
        return packed.new_zeros(*self.mask.shape, packed.shape[-1]).index_put((self.mask,), packed)

    def at(self, values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to the sentences of these numbers: (N, S, E), (N, W) -> (N, W, E) and where there is one (N, W).

        Zero where there is no sentence.
        """
        last = self.table.shape[1] - 1
        rows = self.table.gather(1, numbers.clamp(min=0, max=last))
        there = (rows >= 0) & (numbers >= 0) & (numbers <= last)
        sentences = values.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))
        return sentences * there[..., None], there


def gather_sentences(tokens: Tensor, numbers: Tensor, *, most: int | None = None) -> Sentences:
    """Mean over the tokens of every sentence, in float32 or wider.

    `most`: keep only the first so many sentences of a text.

    Shape: tokens (N, L, D), numbers (N, L) with -1 for tokens outside every sentence
    Raises ValueError for a text without any sentence.
    """
    each = torch.arange(int(numbers.max().clamp(min=0)) + 1, device=numbers.device)
    present = (numbers[..., None] == each).any(dim=1)
    row = present.cumsum(dim=1) - 1
    present &= row < (len(each) if most is None else most)
    count = present.sum(dim=1)
    if not count.all():
        empty = (count == 0).nonzero().flatten().tolist()
        raise ValueError(f"texts {empty} have no token in any sentence: give sentence_ids (`tokenize` makes them)")
    means = words_from_pieces(widened(tokens), numbers, len(each), how="mean")
    mask = torch.arange(int(count.max()), device=count.device) < count[:, None]
    return Sentences(mask, row.masked_fill(~present, -1), means[present])


def local_nce(sentences: Tensor, seen: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE among the sentences of one text, both directions, mean over its sentences and then over texts; scalar.

    A text of one sentence gives 0.

    Shape: sentences, seen (N, S, D), mask (N, S), scale ()
    """
    with torch.autocast(sentences.device.type, enabled=False):
        left, right = (F.normalize(widened(value), dim=-1) for value in (sentences, seen))
        logits = (scale * left @ right.transpose(1, 2)).masked_fill(~(mask[:, None] & mask[..., None]), -1e9)
        pairs = [logits.log_softmax(dim=axis).diagonal(dim1=1, dim2=2) for axis in (1, 2)]
        return -((pairs[0] + pairs[1]) * mask).sum(dim=1).div(2 * mask.sum(dim=1)).mean()


def mutual_prediction(one: Tensor, other: Tensor, predictor: nn.Module) -> Tensor:
    """-1/2 mean [ cos(p(x), sg(y)) + cos(p(y), sg(x)) ] with stop-gradient sg (SimSiam, Chen & He, CVPR 2021); scalar.

    Shape: one, other (N, R, D)
    """
    both = ((predictor(one), other), (predictor(other), one))
    return -sum(F.cosine_similarity(widened(x), widened(y).detach(), dim=-1).mean() for x, y in both) / 2


class CrossAttention(NamedTuple):
    """Sigmoid weights both ways, and what they collect.

    Shape: `of_region` (N, R, S), `of_sentence` (N, S, R); `told` (N, R, D) the text at every region, `seen` (N, S, D)
    the image for every sentence. Columns of missing sentences are zero in `of_region`; their rows in the other two
    mean nothing.
    """

    of_region: Tensor
    of_sentence: Tensor
    told: Tensor
    seen: Tensor


class SentenceRegionAttention(nn.Module):
    """Attention both ways by sigmoids: a sentence may be seen in many regions, in few, or in none.

    With regions Z, sentences S and projections q, k, v (1: of regions, 2: of sentences):

        of_region = sigmoid(q1(Z) k2(S)^T / sqrt(D)),   told = of_region v2(S)
        of_sentence = sigmoid(q2(S) k1(Z)^T / sqrt(D)), seen = of_sentence v1(Z)

    Shape: regions (N, R, D), sentences (N, S, D), mask (N, S)
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query1, self.key1, self.value1 = (nn.Linear(dim, dim) for _ in range(3))
        self.query2, self.key2, self.value2 = (nn.Linear(dim, dim) for _ in range(3))
        self.scale = dim**-0.5

    def forward(self, regions: Tensor, sentences: Tensor, mask: Tensor) -> CrossAttention:
        of_region = (self.query1(regions) @ self.key2(sentences).transpose(1, 2) * self.scale).sigmoid()
        of_region = of_region * mask[:, None]
        of_sentence = (self.query2(sentences) @ self.key1(regions).transpose(1, 2) * self.scale).sigmoid()
        told, seen = of_region @ self.value2(sentences), of_sentence @ self.value1(regions)
        return CrossAttention(*map(widened, (of_region, of_sentence, told, seen)))

    def pair_scores(self, regions: Tensor, sentences: Tensor, mask: Tensor) -> Tensor:
        """(B, N): mean weight over regions and sentences of every image with every text, both ways averaged.

        Shape: regions (B, R, D), sentences (N, S, D), mask (N, S)
        """
        query1, key1 = self.query1(regions), self.key1(regions)
        query2, key2 = self.query2(sentences), self.key2(sentences)
        chunk = max(1, PAIRS_AT_ONCE // (regions.shape[0] * regions.shape[1] * sentences.shape[1]))
        scores = []
        for part in torch.arange(len(sentences), device=mask.device).split(chunk):
            there = mask[part].to(torch.float32)
            weights = torch.einsum("brd,nsd->bnrs", query1, key2[part]) * self.scale
            total = widened(weights).sigmoid().mean(dim=2)
            weights = torch.einsum("nsd,brd->bnrs", query2[part], key1) * self.scale
            total = total + widened(weights).sigmoid().mean(dim=2)
            scores.append((total * there).sum(dim=2) / (2 * there.sum(dim=1)))
        return torch.cat(scores, dim=1)


def gumbel(logits: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of `logits`, from torch's generator."""
    return -torch.empty_like(logits).exponential_().log()


def decayed(temperature: float, share: float, decay: Decay) -> float:
    """tau after a share (0 to 1) of its way down to a tenth; "fixed" stays."""
    return temperature * {"fixed": 1.0, "linear": 1 - 0.9 * share, "exp": 0.1**share}[decay]


class PrototypeBank(nn.Module):
    """Every sentence becomes a mixture of a few hundred learned prototypes (released code, `spb.py`).

    With sentence x, prototypes e_k, temperature tau and Gumbel noise g (Jang, Gu, Poole: "Categorical
    Reparameterization with Gumbel-Softmax", ICLR 2017):

        l_k = x . e_k,   w = softmax( (l + g) / tau ),   q = sum_k w_k e_k

    `temperature` is tau and may be set between steps.
    `noise`: gives the noise for logits (M, K); replace it to have the noise of another generator, or none at all
    (`bank.noise = torch.zeros_like`). It is asked for while training, and in evaluation mode where `noisy_in_eval`.

    Shape: (M, D) -> (M, D), logits (M, K); float32 or wider, also under autocast
    """

    def __init__(self, n_prototypes: int, dim: int, *, temperature: float = 0.9, noisy_in_eval: bool = False) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(n_prototypes, dim))
        self.temperature, self.noisy_in_eval = temperature, noisy_in_eval
        self.noise: Callable[[Tensor], Tensor] = gumbel

    def forward(self, sentences: Tensor) -> tuple[Tensor, Tensor]:
        """The mixtures, and the logits without noise."""
        logits = self.logits(sentences)
        noisy = logits + self.noise(logits) if self.training or self.noisy_in_eval else logits
        with torch.autocast(logits.device.type, enabled=False):
            return (noisy / self.temperature).softmax(dim=-1) @ self.prototypes, logits

    def logits(self, sentences: Tensor) -> Tensor:
        """(M, D) -> (M, K) dot products with the prototypes."""
        with torch.autocast(sentences.device.type, enabled=False):
            return widened(sentences) @ self.prototypes.T
