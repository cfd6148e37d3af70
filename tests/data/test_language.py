"""The language of a text is told where it can be told, and only then held against it."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.contracts.errors import SpecError
from tasks.data import language
from tasks.data.language import MIN_BYTES, check_languages, detect_language, language_problem

EXAMPLES = Path(__file__).parents[2] / "examples"
# The first article of the Universal Declaration of Human Rights.
ARTICLE = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and"
    " conscience and should act towards one another in a spirit of brotherhood.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und "
    "Gewissen begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de "
    "raison et de conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de "
    "razón y conciencia, deben comportarse fraternalmente los unos con los otros.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di "
    "ragione e di coscienza e devono agire gli uni verso gli altri in spirito di fratellanza.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de "
    "consciência, devem agir uns para com os outros em espírito de fraternidade.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met "
    "verstand en geweten, en behoren zich jegens elkander in een geest van broederschap te gedragen.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni"
    " rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa.",
    "sv": "Alla människor är födda fria och lika i värde och rättigheter. De har utrustats med förnuft och "
    "samvete och bör handla gentemot varandra i en anda av gemenskap.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve "
    "birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan. Heille on annettu "
    "järki ja omatunto, ja heidän on toimittava toisiaan kohtaan veljeyden hengessä.",
    "hu": "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek, ésszel és "
    "lelkiismerettel bírván, egymással szemben testvéri szellemben kell hogy viseltessenek.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и "
    "совестью и должны поступать в отношении друг друга в духе братства.",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і "
    "совістю і повинні діяти у відношенні один до одного в дусі братерства.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι "
    "προικισμένοι με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται μεταξύ τους με πνεύμα "
    "αδελφοσύνης.",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم "
    "بعضا بروح الإخاء",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם כולם חוננו בתבונה ובמצפון לפיכך חובה עליהם "
    "לנהוג איש ברעהו ברוח של אחוה",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है उन्हें बुद्धि और अन्तरात्मा की देन प्राप्त है",
    "zh": "人人生而自由 在尊严和权利上一律平等 他们赋有理性和良心 并应以兄弟关系的精神相对待",
    "ja": "すべての人間は 生まれながらにして自由であり かつ 尊厳と権利とについて平等である"
    " 人間は 理性と良心とを授けられている",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어"
    " 동등하다 인간은 천부적으로 이성과 양심을 부여받았으며",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi. Mọi con người "
    "đều được tạo hóa ban cho lý trí và lương tâm và cần phải đối xử với nhau trong tình anh em.",
    "id": "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama. Mereka dikaruniai "
    "akal dan hati nurani dan hendaknya bergaul satu sama lain dalam semangat persaudaraan.",
}


def texts(name: str) -> list[str]:
    lines = (EXAMPLES / name / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def size(text: str) -> int:
    return len("".join(filter(str.isalpha, text)).encode())


def pieces(size_wanted: int) -> list[tuple[str, str]]:
    """Runs of words with at least so many bytes of letters, from every place of every article."""
    found = []
    for code, article in ARTICLE.items():
        words = article.split()
        for first in range(len(words)):
            for last in range(first + 1, len(words) + 1):
                piece = " ".join(words[first:last])
                if size(piece) >= size_wanted:
                    found.append((code, piece))
                    break
    return found


TOLD_FOR_KIN = {"id": "ms"}


@pytest.mark.parametrize("code", ARTICLE)
def test_whole_articles(code: str) -> None:
    for text in (ARTICLE[code], ARTICLE[code].upper()):
        found = detect_language(text)
        assert found is not None
        assert found.code == TOLD_FOR_KIN.get(code, code)
        assert found.confidence > 0.5
        assert (language_problem(text, ("en",)) is None) == (code == "en")
        assert language_problem(text, ("en", code)) is None


def test_what_is_long_enough_is_told_rightly() -> None:
    """Measured on 459 runs of words of 23 languages, each of just 40 bytes: 98.3 % right, all of the 8 wrong ones
    Indonesian taken for Malay; 98.6 % of those not in English refused where English alone is allowed, none wrongly
    where their own language is.
    """
    cases = pieces(MIN_BYTES)
    assert len(cases) == 459
    told = [(code, detect_language(piece)) for code, piece in cases]
    right = [found is not None and found.code == code for code, found in told]
    assert sum(right) / len(right) >= 0.98
    assert {(code, found and found.code) for code, found in told if not found or found.code != code} == {("id", "ms")}
    refused = [language_problem(piece, ("en",)) is not None for code, piece in cases if code != "en"]
    assert sum(refused) / len(refused) >= 0.98
    assert [piece for code, piece in cases if language_problem(piece, (code,))] == []


def test_english_complaints_are_english() -> None:
    """Of 2,148 real complaints with redactions, amounts and capitals none is taken for another language."""
    found = [detect_language(text) for text in texts("complaints")]
    assert {language.code for language in found if language is not None} == {"en"}
    assert sum(language is None for language in found) / len(found) < 0.05
    assert [text for text in texts("complaints") if language_problem(text, ("en",))] == []


@pytest.mark.parametrize(
    "text", ["", "ok", "Bank", "12.50 €", "XXXX XXXX", "https://www.lemonde.fr/economie/article/les-banques"]
)
def test_too_short_a_text_has_no_language(text: str) -> None:
    assert detect_language(text) is None
    assert language_problem(text, ("en",)) is None


def test_the_least_length_is_that_of_letters() -> None:
    words = "this is a plain english sentence about money paid twice"
    enough = next(n for n in range(len(words)) if size(words[:n]) >= MIN_BYTES)
    assert detect_language(words[: enough - 1]) is None
    assert detect_language(words[: enough - 1] + " 1234567890 !!!") is None
    found = detect_language(words[:enough])
    assert found is not None
    assert found.code == "en"


def test_prices_are_in_no_language() -> None:
    assert [text for text in texts("prices") if language_problem(text, ("en",))] == []


def test_a_problem_says_which_language_how_sure_and_what_is_allowed() -> None:
    assert language_problem(ARTICLE["de"], ("en", "fr")) == "language is de (100% sure), allowed: en, fr"


def test_redactions_and_addresses_do_not_count() -> None:
    noise = " XXXX 12/03/2019 https://www.lemonde.fr/les-banques jane.roe@gmail.com {$10.00} "
    words = ARTICLE["de"].split()
    assert (detect_language(noise.join(words)) or ("", 0))[0] == "de"


def test_languages_beyond_two_letters_are_told_where_asked_for() -> None:
    pidgin = "We dey tell una say di money wey dem take comot from my account no be me spend am and e never come back"
    assert (detect_language(pidgin, ("pcm",)) or ("", 0))[0] == "pcm"
    assert (detect_language(pidgin) or ("", 0))[0] != "pcm"


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        check_languages(["en", "english", "xx"])
    assert caught.value.what == "'english', 'xx': no language that can be told."
    assert caught.value.where == "data.languages"
    assert "de, " in caught.value.fix
    with pytest.raises(SpecError):
        language_problem(ARTICLE["en"], ("english",))
    check_languages(["en", "de", "zh", "pcm"])


def test_the_answer_depends_on_the_text_alone() -> None:
    cases = [piece for _, piece in pieces(60)]
    first = {piece: detect_language(piece) for piece in cases}
    random.Random(2).shuffle(cases)
    assert {piece: detect_language(piece, ("de", "en")) for piece in cases} == first
    assert {piece: detect_language(piece, ("en", "de")) for piece in cases} == first


def test_nothing_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    language._all_languages.cache_clear()
    language._identifier.cache_clear()
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert (detect_language(ARTICLE["fr"]) or ("", 0))[0] == "fr"
    assert asked == []


def test_the_model_is_loaded_only_when_asked() -> None:
    program = "import sys, tasks.data.language; print('py3langid' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
