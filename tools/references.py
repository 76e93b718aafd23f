"""Writes docs/losses/references.bib from the docstrings: each work that one cites, and who cites it.

    python tools/references.py

A docstring cites as "Chen et al. 2020". What such a citation means stands below, in WORKS; a work that no docstring
cites, and a citation without a work, are errors. `tests/house/test_references.py` holds the committed file to this.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).absolute().parent.parent
PAGE = ROOT / "docs" / "losses" / "references.bib"
CITATION = re.compile(r"(?:van den )?[A-Z][\w-]+(?: et al\.| (?:&|and) [A-Z][\w-]+)? (?:19|20)\d\d\b")
KINDS = {"Transactions": ("article", "journal"), "Research": ("techreport", "institution")}  # by a word of `where`
HEAD = "% Written by tools/references.py from the docstrings of fusedloss.\n"


class Work(NamedTuple):
    key: str
    authors: str  # separated by "; "
    title: str
    where: str  # the proceedings, the journal or the report; "" for a preprint
    arxiv: str = ""


# By the citation and, where two works share one, "; " and the name of the file that cites the second.
WORKS = {
    "Burges 2010": Work(
        "burges2010lambdamart",
        "Burges, Christopher J. C.",
        "From RankNet to LambdaRank to LambdaMART: An Overview",
        "Microsoft Research, MSR-TR-2010-82",
    ),
    "Burges et al. 2005": Work(
        "burges2005ranknet",
        "Burges, Chris; Shaked, Tal; Renshaw, Erin; Lazier, Ari; Deeds, Matt; Hamilton, Nicole; Hullender, Greg",
        "Learning to Rank using Gradient Descent",
        "ICML",
    ),
    "Cao et al. 2007": Work(
        "cao2007listnet",
        "Cao, Zhe; Qin, Tao; Liu, Tie-Yan; Tsai, Ming-Feng; Li, Hang",
        "Learning to Rank: From Pairwise Approach to Listwise Approach",
        "ICML",
    ),
    "Carlsson et al. 2021": Work(
        "carlsson2021tension",
        "Carlsson, Fredrik; Gyllensten, Amaru Cuba; Gogoulou, Evangelia; Hellqvist, Erik Ylipää; Sahlgren, Magnus",
        "Semantic Re-Tuning with Contrastive Tension",
        "ICLR",
    ),
    "Chen et al. 2020": Work(
        "chen2020simclr",
        "Chen, Ting; Kornblith, Simon; Norouzi, Mohammad; Hinton, Geoffrey",
        "A Simple Framework for Contrastive Learning of Visual Representations",
        "ICML",
        "2002.05709",
    ),
    "Deng et al. 2019": Work(
        "deng2019arcface",
        "Deng, Jiankang; Guo, Jia; Xue, Niannan; Zafeiriou, Stefanos",
        "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
        "CVPR",
        "1801.07698",
    ),
    "Chuang et al. 2020": Work(
        "chuang2020debiased",
        "Chuang, Ching-Yao; Robinson, Joshua; Lin, Yen-Chen; Torralba, Antonio; Jegelka, Stefanie",
        "Debiased Contrastive Learning",
        "NeurIPS",
        "2007.00224",
    ),
    "Gao et al. 2021": Work(
        "gao2021gradcache",
        "Gao, Luyu; Zhang, Yunyi; Han, Jiawei; Callan, Jamie",
        "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        "RepL4NLP",
        "2101.06983",
    ),
    "Günther et al. 2024": Work(
        "gunther2024jina",
        "Günther, Michael; Ong, Jackmin; Mohr, Isabelle; Abdessalem, Alaeddine; Abel, Tanguy; Akram, Mohammad Kalim; "
        "Guzman, Susana; Mastrapas, Georgios; Sturua, Saba; Wang, Bo; Werk, Maximilian; Wang, Nan; Xiao, Han",
        "Jina Embeddings 2: 8192-Token General-Purpose Text Embeddings for Long Documents",
        "",
        "2310.19923",
    ),
    "Hadsell et al. 2006": Work(
        "hadsell2006contrastive",
        "Hadsell, Raia; Chopra, Sumit; LeCun, Yann",
        "Dimensionality Reduction by Learning an Invariant Mapping",
        "CVPR",
    ),
    "He et al. 2020": Work(
        "he2020moco",
        "He, Kaiming; Fan, Haoqi; Wu, Yuxin; Xie, Saining; Girshick, Ross",
        "Momentum Contrast for Unsupervised Visual Representation Learning",
        "CVPR",
        "1911.05722",
    ),
    "Henderson et al. 2017": Work(
        "henderson2017smartreply",
        "Henderson, Matthew; Al-Rfou, Rami; Strope, Brian; Sung, Yun-hsuan; Lukács, László; Guo, Ruiqi; Kumar, Sanjiv; "
        "Miklos, Balint; Kurzweil, Ray",
        "Efficient Natural Language Response Suggestion for Smart Reply",
        "",
        "1705.00652",
    ),
    "Hermans et al. 2017": Work(
        "hermans2017triplet",
        "Hermans, Alexander; Beyer, Lucas; Leibe, Bastian",
        "In Defense of the Triplet Loss for Person Re-Identification",
        "",
        "1703.07737",
    ),
    "Hinton et al. 2015": Work(
        "hinton2015distilling",
        "Hinton, Geoffrey; Vinyals, Oriol; Dean, Jeff",
        "Distilling the Knowledge in a Neural Network",
        "",
        "1503.02531",
    ),
    "Hofstätter et al. 2021": Work(
        "hofstatter2021marginmse",
        "Hofstätter, Sebastian; Althammer, Sophia; Schröder, Michael; Sertkan, Mete; Hanbury, Allan",
        "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation",
        "",
        "2010.02666",
    ),
    "Huang et al. 2024": Work(
        "huang2024cosent",
        "Huang, Xiang; Peng, Hao; Zou, Dongcheng; Liu, Zhiwei; Li, Jianxin; Liu, Kay; Wu, Jia; Su, Jianlin; "
        "Yu, Philip S.",
        "CoSENT: Consistent Sentence Embedding via Similarity Ranking",
        "IEEE/ACM Transactions on Audio, Speech, and Language Processing",
    ),
    "Khosla et al. 2020": Work(
        "khosla2020supcon",
        "Khosla, Prannay; Teterwak, Piotr; Wang, Chen; Sarna, Aaron; Tian, Yonglong; Isola, Phillip; "
        "Maschinot, Aaron; Liu, Ce; Krishnan, Dilip",
        "Supervised Contrastive Learning",
        "NeurIPS",
        "2004.11362",
    ),
    "Kim et al. 2020": Work(
        "kim2020proxyanchor",
        "Kim, Sungyeon; Kim, Dongwon; Cho, Minsu; Kwak, Suha",
        "Proxy Anchor Loss for Deep Metric Learning",
        "CVPR",
        "2003.13911",
    ),
    "Kim et al. 2023": Work(
        "kim2023embeddistill",
        "Kim, Seungyeon; Rawat, Ankit Singh; Zaheer, Manzil; Jayasumana, Sadeep; Sadhanala, Veeranjaneyulu; "
        "Jitkrittum, Wittawat; Menon, Aditya Krishna; Fergus, Rob; Kumar, Sanjiv",
        "EmbedDistill: A Geometric Knowledge Distillation for Information Retrieval",
        "",
        "2301.12005",
    ),
    "Kim et al. 2024": Work(
        "kim2024contaccum",
        "Kim, Jaehee; Lee, Yukyung; Kang, Pilsung",
        "A Gradient Accumulation Method for Dense Retriever under Memory Constraint",
        "NeurIPS",
        "2406.12356",
    ),
    "Kusupati et al. 2022": Work(
        "kusupati2022matryoshka",
        "Kusupati, Aditya; Bhatt, Gantavya; Rege, Aniket; Wallingford, Matthew; Sinha, Aditya; Ramanujan, Vivek; "
        "Howard-Snyder, William; Chen, Kaifeng; Kakade, Sham; Jain, Prateek; Farhadi, Ali",
        "Matryoshka Representation Learning",
        "NeurIPS",
        "2205.13147",
    ),
    "Lan et al. 2014": Work(
        "lan2014plistmle",
        "Lan, Yanyan; Zhu, Yadong; Guo, Jiafeng; Niu, Shuzi; Cheng, Xueqi",
        "Position-Aware ListMLE: A Sequential Learning Process for Ranking",
        "UAI",
    ),
    "Lan et al. 2025": Work(
        "lan2025llave",
        "Lan, Zhibin; Niu, Liqiang; Meng, Fandong; Zhou, Jie; Su, Jinsong",
        "LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive Learning",
        "",
        "2503.04812",
    ),
    "Li & Li 2024": Work(
        "li2024angle",
        "Li, Xianming; Li, Jing",
        "AoE: Angle-optimized Embeddings for Semantic Textual Similarity",
        "ACL",
        "2309.12871",
    ),
    "Li et al. 2023": Work(
        "li2023gte",
        "Li, Zehan; Zhang, Xin; Zhang, Yanzhao; Long, Dingkun; Xie, Pengjun; Zhang, Meishan",
        "Towards General Text Embeddings with Multi-stage Contrastive Learning",
        "",
        "2308.03281",
    ),
    "Li et al. 2024": Work(
        "li2024matryoshka2d",
        "Li, Xianming; Li, Zongxi; Li, Jing; Xie, Haoran; Li, Qing",
        "2D Matryoshka Sentence Embeddings",
        "",
        "2402.14776",
    ),
    "Lin et al. 2017": Work(
        "lin2017focal",
        "Lin, Tsung-Yi; Goyal, Priya; Girshick, Ross; He, Kaiming; Dollár, Piotr",
        "Focal Loss for Dense Object Detection",
        "ICCV",
        "1708.02002",
    ),
    "Lin et al. 2020": Work(
        "lin2020distilling",
        "Lin, Sheng-Chieh; Yang, Jheng-Hong; Lin, Jimmy",
        "Distilling Dense Representations for Ranking using Tightly-Coupled Teachers",
        "",
        "2010.11386",
    ),
    "Movshovitz-Attias et al. 2017": Work(
        "movshovitz2017proxynca",
        "Movshovitz-Attias, Yair; Toshev, Alexander; Leung, Thomas K.; Ioffe, Sergey; Singh, Saurabh",
        "No Fuss Distance Metric Learning using Proxies",
        "ICCV",
        "1703.07464",
    ),
    "Radford et al. 2021": Work(
        "radford2021clip",
        "Radford, Alec; Kim, Jong Wook; Hallacy, Chris; Ramesh, Aditya; Goh, Gabriel; Agarwal, Sandhini; "
        "Sastry, Girish; Askell, Amanda; Mishkin, Pamela; Clark, Jack; Krueger, Gretchen; Sutskever, Ilya",
        "Learning Transferable Visual Models From Natural Language Supervision",
        "ICML",
        "2103.00020",
    ),
    "Reimers & Gurevych 2020": Work(
        "reimers2020multilingual",
        "Reimers, Nils; Gurevych, Iryna",
        "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
        "EMNLP",
        "2004.09813",
    ),
    "Reimers and Gurevych 2019": Work(
        "reimers2019sbert",
        "Reimers, Nils; Gurevych, Iryna",
        "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
        "EMNLP",
        "1908.10084",
    ),
    "Schlatt et al. 2025": Work(
        "schlatt2025rankdistillm",
        "Schlatt, Ferdinand; Fröbe, Maik; Scells, Harrisen; Zhuang, Shengyao; Koopman, Bevan; Zuccon, Guido; "
        "Stein, Benno; Potthast, Martin; Hagen, Matthias",
        "Rank-DistiLLM: Closing the Effectiveness Gap Between Cross-Encoders and LLMs for Passage Re-Ranking",
        "ECIR",
        "2405.07920",
    ),
    "Schroff et al. 2015": Work(
        "schroff2015facenet",
        "Schroff, Florian; Kalenichenko, Dmitry; Philbin, James",
        "FaceNet: A Unified Embedding for Face Recognition and Clustering",
        "CVPR",
        "1503.03832",
    ),
    "Solatorio 2024": Work(
        "solatorio2024gistembed",
        "Solatorio, Aivin V.",
        "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning",
        "",
        "2402.16829",
    ),
    "Steele et al. 2014": Work(
        "steele2014splittable",
        "Steele, Guy L.; Lea, Doug; Flood, Christine H.",
        "Fast Splittable Pseudorandom Number Generators",
        "OOPSLA",
    ),
    "Sun et al. 2020": Work(
        "sun2020circle",
        "Sun, Yifan; Cheng, Changmao; Zhang, Yuhan; Zhang, Chi; Zheng, Liang; Wang, Zhongdao; Wei, Yichen",
        "Circle Loss: A Unified Perspective of Pair Similarity Optimization",
        "CVPR",
        "2002.10857",
    ),
    "Teh et al. 2020": Work(
        "teh2020proxyncapp",
        "Teh, Eu Wern; DeVries, Terrance; Taylor, Graham W.",
        "ProxyNCA++: Revisiting and Revitalizing Proxy Neighborhood Component Analysis",
        "ECCV",
        "2004.01113",
    ),
    "van den Oord et al. 2018": Work(
        "oord2018infonce",
        "van den Oord, Aaron; Li, Yazhe; Vinyals, Oriol",
        "Representation Learning with Contrastive Predictive Coding",
        "",
        "1807.03748",
    ),
    "Wang et al. 2018": Work(
        "wang2018lambdaloss",
        "Wang, Xuanhui; Li, Cheng; Golbandi, Nadav; Bendersky, Michael; Najork, Marc",
        "The LambdaLoss Framework for Ranking Metric Optimization",
        "CIKM",
    ),
    "Wang et al. 2018; margin_softmax": Work(
        "wang2018cosface",
        "Wang, Hao; Wang, Yitong; Zhou, Zheng; Ji, Xing; Gong, Dihong; Zhou, Jingchao; Li, Zhifeng; Liu, Wei",
        "CosFace: Large Margin Cosine Loss for Deep Face Recognition",
        "CVPR",
        "1801.09414",
    ),
    "Wang et al. 2019": Work(
        "wang2019multisimilarity",
        "Wang, Xun; Han, Xintong; Huang, Weilin; Dong, Dengke; Scott, Matthew R.",
        "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning",
        "CVPR",
        "1904.06627",
    ),
    "Wang et al. 2020": Work(
        "wang2020xbm",
        "Wang, Xun; Zhang, Haozhi; Huang, Weilin; Scott, Matthew R.",
        "Cross-Batch Memory for Embedding Learning",
        "CVPR",
        "1912.06798",
    ),
    "Wieting & Gimpel 2018": Work(
        "wieting2018paranmt",
        "Wieting, John; Gimpel, Kevin",
        "ParaNMT-50M: Pushing the Limits of Paraphrastic Sentence Embeddings with Millions of Machine Translations",
        "ACL",
        "1711.05732",
    ),
    "Xia et al. 2008": Work(
        "xia2008listmle",
        "Xia, Fen; Liu, Tie-Yan; Wang, Jue; Zhang, Wensheng; Li, Hang",
        "Listwise Approach to Learning to Rank: Theory and Algorithm",
        "ICML",
    ),
    "Yeh et al. 2022": Work(
        "yeh2022dcl",
        "Yeh, Chun-Hsiao; Hong, Cheng-Yao; Hsu, Yen-Chi; Liu, Tyng-Luh; Chen, Yubei; LeCun, Yann",
        "Decoupled Contrastive Learning",
        "ECCV",
        "2110.06848",
    ),
    "Zhai et al. 2023": Work(
        "zhai2023siglip",
        "Zhai, Xiaohua; Mustafa, Basil; Kolesnikov, Alexander; Beyer, Lucas",
        "Sigmoid Loss for Language Image Pre-Training",
        "ICCV",
        "2303.15343",
    ),
    "Zhang et al. 2017": Work(
        "zhang2017spreadout",
        "Zhang, Xu; Yu, Felix X.; Kumar, Sanjiv; Chang, Shih-Fu",
        "Learning Spread-out Local Feature Descriptors",
        "ICCV",
        "1708.06320",
    ),
    "Zhang and Sabuncu 2018": Work(
        "zhang2018generalized",
        "Zhang, Zhilu; Sabuncu, Mert R.",
        "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
        "NeurIPS",
        "1805.07836",
    ),
}


def citations() -> Iterator[tuple[str, str]]:
    """Yields what stands in a docstring as "Chen et al. 2020", as a key of WORKS, and the name of who has it."""
    for file in sorted((ROOT / "fusedloss").rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in [tree, *ast.walk(tree)]:
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                name = file.stem if isinstance(node, ast.Module) else node.name
                for cited in CITATION.findall(text):
                    own = f"{cited}; {file.stem}"
                    yield (own if own in WORKS else cited), name


def written() -> str:
    """The file: works by their keys, each with the functions that cite it."""
    cited: dict[str, dict[str, None]] = {}
    for text, name in citations():
        cited.setdefault(text, {})[name] = None
    unknown, unused = sorted(cited.keys() - WORKS.keys()), sorted(WORKS.keys() - cited.keys())
    if unknown or unused:
        raise SystemExit(f"WORKS must hold what docstrings cite: it lacks {unknown}, and {unused} are not cited")
    entries = []
    for text, work in sorted(WORKS.items(), key=lambda item: item[1].key):
        year = re.findall(r"\d{4}", text)[0]
        fields = {"author": work.authors.replace("; ", " and "), "title": f"{{{work.title}}}", "year": year}
        kind, place = next(
            (found for word, found in KINDS.items() if word in work.where), ("inproceedings", "booktitle")
        )
        if work.where:
            fields[place] = work.where
        if work.arxiv:
            fields |= {"eprint": work.arxiv, "archiveprefix": "arXiv"}
        fields["note"] = f"fusedloss: {', '.join(sorted(cited[text]))}".replace("_", r"\_")
        lines = [f"  {name} = {{{value}}},\n" for name, value in fields.items()]
        entries.append(f"@{kind if work.where else 'misc'}{{{work.key},\n{''.join(lines)}}}\n")
    return "\n".join([HEAD, *entries])


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(written())
    print(f"{len(WORKS)} works in {PAGE.relative_to(ROOT)}")
